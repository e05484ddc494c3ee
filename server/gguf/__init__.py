"""Models in llama.cpp's GGUF files, unpacked once into Hugging Face folders.

transformers reads such files and does not take all that they say: scaled rotary embeddings, what splits a text before
its bytes are merged, and more. What it leaves out is either set here or refused by name.
"""

from server.gguf.source import MARK, find_gguf, read_facts
from server.gguf.unpack import ensure_unpacked, unpack

__all__ = ["MARK", "ensure_unpacked", "find_gguf", "read_facts", "unpack"]
