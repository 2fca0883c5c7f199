"""Which checkpoints can pyfused read and write? Hugging Face and Keras directories, by one set of names.

checkpoint = open_checkpoint("hf://openai-community/gpt2")   # or a directory, a bundled name, a KerasHub name
checkpoint.load_into(module)                                 # or: for name, tensor in checkpoint.tensors(): ...
"""

from pyfused.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pyfused.checkpoints.presets import presets_of, resolve_preset
from pyfused.checkpoints.progress import quiet
from pyfused.checkpoints.save import convert, save_hf, save_to_preset
from pyfused.checkpoints.tokenizer_stream import StreamDecoder

__all__ = [
    "Checkpoint",
    "StreamDecoder",
    "convert",
    "open_checkpoint",
    "presets_of",
    "quiet",
    "resolve_preset",
    "save_hf",
    "save_to_preset",
]
