"""One run at the service that `train.report_to` names, from its start to its last figure.

transformers sends the figures. Left alone it puts every run into the project "huggingface", opens a
new run at each resume (trackio even for the held-out figures after the last step), never closes
W&B's, so that the next run of a Python process goes on in it, and has W&B write into the working
directory. Here a run keeps the name that `run.json` gave it at its start.
"""

import contextlib
import os
from collections.abc import Iterator

from trl import SFTConfig

from cogvlm_sft.errors import RecipeError
from cogvlm_sft.recipe import Recipe
from cogvlm_sft.training.provenance import read_run_file

PROJECT = "cogvlm-sft"


@contextlib.contextmanager
def service_run(
    arguments: SFTConfig, recipe: Recipe, *, first: bool, resumed: bool
) -> Iterator[None]:
    """Open the run at the service, and close it with its last figure.

    Args:
        arguments: get the names; changed in place.
        recipe: the run's; its `run.json` is written already.
        first: whether this process is the one that reports.
        resumed: whether the run goes on from a snapshot.
    """
    service = recipe.train.report_to
    if not first or service not in ("wandb", "trackio"):
        yield
        return
    # A run begun before names were written goes on under its folder's.
    name = read_run_file(recipe.train.output).get("name", recipe.train.output.name)
    arguments.project, arguments.run_name = PROJECT, name
    if service == "trackio":
        import trackio

        try:
            yield
        finally:
            # transformers closed the run after the last step and opened it again for figures since.
            if trackio.context_vars.current_run.get() is not None:
                trackio.finish()
        return
    import wandb

    if wandb.run is not None:  # the caller's own, who also closes it
        yield
        return
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=name,
        name=name,
        dir=os.environ.get("WANDB_DIR", str(recipe.train.output)),
        resume="allow" if resumed else None,
    )
    status = 1
    try:
        yield
        status = 0
    finally:
        run.finish(exit_code=status)


def check_service(service: str) -> None:
    """Refuse what transformers' integration could not do in a run's folder.

    Raises:
        RecipeError: W&B is told to upload checkpoints, from folders that only transformers writes.
    """
    upload = os.environ.get("WANDB_LOG_MODEL", "false")
    if service == "wandb" and upload.lower() not in ("", "false"):
        raise RecipeError(
            f"WANDB_LOG_MODEL is {upload!r}, but W&B would look for transformers' checkpoint "
            "folders, which a run does not have; unset it, and upload the finished checkpoint"
        )
