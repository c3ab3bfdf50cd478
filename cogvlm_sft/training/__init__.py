"""Training by a recipe; `cogvlm_sft.training.run.train` is the way in."""
