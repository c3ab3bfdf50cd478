"""Training by a recipe; `cogvlm_sft.training.run.train` is the way in."""

import logging

# peft imports bitsandbytes, which reports on a CPU that its optional kernels are not installed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
