"""A tiny model with a real tokenizer, as a Hugging Face folder that a server can load."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny_models import tiny_model

VOCABULARY = 384
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "What is the capital of France? The capital of France is Paris, of course.",
    "Grüße aus Köln: 10 € für Käse! 日本語のテキスト 🎉👩‍👩‍👧 done",
]
# Calls as Hermes' and Qwen's templates write them.
CHAT_TEMPLATE = """\
{%- if tools %}<tools>{% for tool in tools %}{{ tool.function.name }} {% endfor -%}
</tools><tool_call>
{% endif %}
{%- for message in messages %}<{{ message.role }}>{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
</tool_call>{% endfor %}</s>
{%- if message.role == "user" and "forbidden" in message.content %}{{ raise_exception("forbidden word") }}{% endif %}
{% endfor %}
{%- if add_generation_prompt %}<assistant>{{ mood | default("") }}{% endif %}"""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text has tokens, and many characters take several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def write_tiny_folder(folder: Path, architecture: str, seed: int) -> PreTrainedModel:
    """Write model and tokenizer; returns the model."""
    model = tiny_model(architecture, seed, VOCABULARY)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model
