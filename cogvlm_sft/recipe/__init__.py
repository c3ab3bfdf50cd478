"""Training recipes: YAML read into typed models, every mistake named before anything is loaded.

A recipe is one YAML file of five sections. Nothing here imports torch or transformers, so that
checking a recipe is instant.
"""

from cogvlm_sft.recipe.load import load_recipe, recipe_from_dict
from cogvlm_sft.recipe.sections import (
    DataSection,
    EvaluateSection,
    EvaluateTask,
    GroupTuning,
    ModelSection,
    Prompt,
    QuantizeSection,
    Recipe,
    Source,
    TrainSection,
    TuneSection,
)

__all__ = [
    "DataSection",
    "EvaluateSection",
    "EvaluateTask",
    "GroupTuning",
    "ModelSection",
    "Prompt",
    "QuantizeSection",
    "Recipe",
    "Source",
    "TrainSection",
    "TuneSection",
    "load_recipe",
    "recipe_from_dict",
]
