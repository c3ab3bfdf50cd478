"""The model's Python files for a machine without cogvlm-sft, generated from `cogvlm_sft/model`.

transformers loads them under `trust_remote_code=True`, which the reader of a checkpoint has to set;
our own code never does. They are the very files that train, with imports made relative, so that
there is one implementation; the errors they raise come along. Operators registered with torch get a
namespace of their own, because a process may hold both copies.
"""

import ast
import re
from pathlib import Path

import cogvlm_sft.errors
import cogvlm_sft.model
from cogvlm_sft.errors import CheckpointError

# Which class transformers' Auto classes find in which of the files.
MODEL_AUTO_MAP = {
    "AutoConfig": "configuration_cogvlm.CogVLMConfig",
    "AutoModel": "modeling_cogvlm.CogVLMModel",
    "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM",
    "AutoModelForImageTextToText": "modeling_cogvlm.CogVLMForCausalLM",
}
PROCESSOR_AUTO_MAP = {
    "AutoImageProcessor": "image_processing_cogvlm.CogVLMImageProcessor",
    "AutoProcessor": "processing_cogvlm.CogVLMProcessor",
}
_ERRORS = "errors_cogvlm"
_NOTE = "# Part of a checkpoint written by cogvlm-sft (Apache-2.0).\n"


def write_remote_code(folder: Path) -> list[Path]:
    """Writes the modelling files.

    Returns:
        The files.

    Raises:
        CheckpointError: a file would need cogvlm-sft after all; a defect of ours.
    """
    sources = {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted(Path(cogvlm_sft.model.__file__).parent.glob("*.py"))
        if path.stem != "__init__"
    }
    sources[_ERRORS] = Path(cogvlm_sft.errors.__file__).read_text(encoding="utf-8")
    written = []
    for name, text in sources.items():
        text = re.sub(r"\bfrom cogvlm_sft\.errors import", f"from .{_ERRORS} import", text)
        text = re.sub(r"\bfrom cogvlm_sft\.model\.(\w+) import", r"from .\1 import", text)
        text = text.replace('"cogvlm_sft::', '"cogvlm_checkpoint::')
        text = text.replace("torch.ops.cogvlm_sft.", "torch.ops.cogvlm_checkpoint.")
        for needed in _imported(text):
            if needed.split(".")[0] == "cogvlm_sft":
                raise CheckpointError(f"{name}.py imports {needed}, which a checkpoint cannot hold")
        file = folder / f"{name}.py"
        file.write_text(_NOTE + text, encoding="utf-8")
        written.append(file)
    return written


def _imported(text: str) -> list[str]:
    """Every module that a file imports absolutely."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module or "")
    return names
