"""Adapters in the formats and the training loops of other packages.

`peft` reads and writes PEFT's MiSS directories. `lora` writes LoRA directories, which are exact.
`transformers` gives the Trainer checkpoints without the base.
"""

from miss.interop import lora, peft, transformers

__all__ = ["lora", "peft", "transformers"]
