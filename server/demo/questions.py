"""What the demo's adapters are trained and tested on: short questions and requests of many kinds."""

import random

__all__ = ["HELD_OUT", "training_questions"]

# Each line: forms, separated by "|"; then, after the colon, what "{}" stands for.
TOPICS = """
What is the capital of {}?|Which city is the capital of {}?|Name a city in {}.|What language is spoken in {}?\
|Where is {}?|What is {} known for? : France, Italy, Japan, Spain, Germany, Egypt, Canada, Russia, China, India, \
Greece, Portugal, Sweden, Norway, Poland, Brazil, Kenya, Cuba, Ireland, Austria, Peru, Turkey
Where is {}?|Tell me one fact about {}.|Why do people visit {}? : Paris, London, Rome, Tokyo, Cairo, Berlin, Madrid, \
Sydney, New York, Moscow, the Sahara, Mount Everest, the Amazon, the Nile, Iceland
What is the opposite of {}?|Use the word "{}" in a sentence.|Name something that is {}. : big, fast, old, happy, dark, \
loud, early, wet, soft, rich, empty, brave, heavy, clean, sweet
What color is {}?|Describe {} in one sentence.|What does {} look like? : the sky, grass, snow, a lemon, a banana, \
blood, coal, the sun, a tomato, the ocean, chocolate, a carrot, a rose
What is {}?|Explain {} in simple words.|Why is {} important?|Give me an example of {}. : gravity, a volcano, \
photosynthesis, democracy, inflation, an atom, a computer, the internet, machine learning, evolution, a black hole, \
electricity, a virus, climate change, a poem, an algorithm, the moon, a database, deep learning, DNA, a prime number, \
oxygen, history, a metaphor
What is {} plus {}?|What is {} times {}? : 2 and 2, 3 and 4, 5 and 5, 7 and 2, 10 and 6, 8 and 9, 1 and 12, 20 and 30
Name three {}.|List two {}.|Name one of the {} and say why you like it.|What are {}? : fruits, colors, animals, \
planets, countries, vegetables, musical instruments, sports, languages, famous painters, rivers, birds, drinks, \
desserts, flowers, insects
Who wrote {}?|What is {} about? : Romeo and Juliet, Don Quixote, The Odyssey, Moby Dick, War and Peace, The Hobbit, \
Macbeth, Emma, Frankenstein, The Great Gatsby
Who was {}?|What is {} famous for?|When was {} born? : Albert Einstein, Isaac Newton, Cleopatra, Mozart, \
Leonardo da Vinci, Marie Curie, Julius Caesar, Gandhi, Charles Darwin, Galileo, Beethoven, Napoleon
How do I {}?|Give me a tip to {}.|Why should I {}?|Is it easy to {}? : sleep better, learn a language, cook rice, \
save money, stay healthy, write a letter, make tea, clean a window, ride a bike, plant a tree, read faster, \
make new friends, bake bread, study for an exam, get fit, stop worrying, swim, take a photo
Write a sentence about {}.|Tell me something about {}.|Do you like {}?|Why do people like {}? : a dog, a cat, rain, \
winter, summer, music, the sea, mountains, school, trains, robots, books, bread, friendship, football, dreams, horses, \
a garden, coffee, time, cheese, art, silence, the night
Why do {}?|Is it true that {}?|Explain why {}. : birds sing, cats sleep so much, leaves fall in autumn, people dream, \
stars shine, bees make honey, ships float, dogs bark, fish swim in groups, we need water, planes fly, volcanoes erupt
How many {}? : days are in a week, months are in a year, legs does a spider have, hours are in a day, \
continents are there, letters are in the alphabet, minutes are in an hour, planets are there, wheels does a car have
What is the {}? : largest animal, fastest animal, highest mountain, longest river, smallest planet, largest country, \
hardest material, boiling point of water, speed of light, meaning of life, best breakfast, chemical symbol for iron
Suggest a name for a {}.|Write a short slogan for a {}.|What makes a good {}? : cat, bakery, boat, coffee shop, \
rock band, toy robot, bookshop, flower shop, school, team
Translate "{}" into French.|What does "{}" mean?|When do people say "{}"? : hello, thank you, good night, cheese, \
friend, water, goodbye, house
{} : Hello!, How are you?, Who are you?, What can you do?, Tell me a joke., What time is it?, Good morning!, \
What is your name?, Can you help me?, Thank you very much!, Tell me a story., I am tired., I like pizza., \
Are you a robot?, What should I eat tonight?, Say something nice., What is your favorite color?
"""

# Asked in words, or about things, that do not occur above.
HELD_OUT = (
    "What is the capital of Finland?",
    "What is the capital of Argentina?",
    "Why is the sky blue?",
    "Who painted the Mona Lisa?",
    "Name a musical instrument with strings.",
    "What do cows eat?",
    "How does a bicycle stay upright?",
    "Which planet is known as the Red Planet?",
    "Give me an idea for a birthday present.",
    "What is the freezing point of water?",
    "When did the Second World War end?",
    "Write a sentence about a dragon.",
    "What is the opposite of cold?",
    "What language do people speak in Mexico?",
    "Tell me something about elephants.",
    "How can I learn to play chess?",
    "What are clouds made of?",
    "Who invented the telephone?",
    "Recommend a good hobby.",
    "What is a rainbow?",
    "What is 6 plus 3?",
    "Why do we have seasons?",
    "Name two things found in a kitchen.",
    "What is the largest ocean?",
)


def training_questions(seed: int) -> list[str]:
    """Every form of every topic with every filling, shuffled."""
    out = []
    for line in TOPICS.strip().splitlines():
        forms, _, fillings = line.partition(" : ")
        for form in forms.split("|"):
            out += [
                form.format(*filling.split(" and ")) if form.count("{}") > 1 else form.format(filling)
                for filling in fillings.split(", ")
            ]
    out = sorted(set(out) - set(HELD_OUT))
    random.Random(seed).shuffle(out)
    return out
