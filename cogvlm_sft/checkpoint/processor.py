"""Tokenizer and image transform of a checkpoint folder, read and written."""

import shutil
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cogvlm_sft.checkpoint.adapter import base_of, is_adapter
from cogvlm_sft.checkpoint.config import load_config
from cogvlm_sft.checkpoint.positions import with_image_size
from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.model import CogVLMConfig, CogVLMImageProcessor, CogVLMProcessor


def load_processor(
    path: str | Path, tokenizer: str | Path | None = None, *, image_size: int | None = None
) -> CogVLMProcessor:
    """The processor of a checkpoint folder.

    Args:
        path: checkpoint folder; released ones hold no tokenizer.
        tokenizer: tokenizer folder to use instead of the checkpoint's own.
        image_size: side of the pictures in pixels, as given to `load_model`.

    Raises:
        CheckpointError: neither folder holds a tokenizer.
    """
    folder = Path(path)
    config = load_config(folder)
    if is_adapter(folder) and not (folder / "processor_config.json").is_file():
        folder = base_of(folder)  # an adapter that another tool wrote
    if image_size is not None:
        return build_processor(
            with_image_size(config, image_size), folder if tokenizer is None else tokenizer
        )
    if tokenizer is None and (folder / "processor_config.json").is_file():
        _check_tokenizer(folder)
        try:
            processor: CogVLMProcessor = CogVLMProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except CheckpointError:
            raise
        except Exception as error:  # transformers and tokenizers raise anything on a damaged file
            raise CheckpointError(f"{folder}: the processor {_why(error)}") from None
        return processor
    return build_processor(config, folder if tokenizer is None else tokenizer)


def build_processor(
    config: CogVLMConfig, tokenizer: str | Path | PreTrainedTokenizerBase
) -> CogVLMProcessor:
    """A processor for a configuration: its picture size and style, with a tokenizer or its folder.

    Raises:
        CheckpointError: the folder is missing or holds no tokenizer, or its vocabulary is larger
            than the model's.
    """
    loaded = load_tokenizer(Path(tokenizer)) if isinstance(tokenizer, str | Path) else tokenizer
    if len(loaded) > config.vocab_size:
        raise CheckpointError(
            f"{loaded.name_or_path}: the tokenizer has {len(loaded)} tokens, the model's "
            f"vocab_size is {config.vocab_size}; expected at most that many"
        )
    if loaded.pad_token is None and config.pad_token_id is not None:
        # Llama-3's tokenizer names none; CogVLM2's configuration takes a reserved one.
        loaded.pad_token = loaded.convert_ids_to_tokens(config.pad_token_id)
    return CogVLMProcessor(
        CogVLMImageProcessor.for_config(config), loaded, style=config.template_version
    )


def save_processor(processor: CogVLMProcessor, folder: Path) -> None:
    """Writes a processor with its tokenizer, `tokenizer.model` included where there was one.

    transformers writes tokenizer.json alone; llama.cpp and LMDeploy read the sentencepiece file.
    """
    processor.save_pretrained(folder)
    model = Path(processor.tokenizer.name_or_path) / "tokenizer.model"
    if model.is_file():
        shutil.copyfile(model, folder / "tokenizer.model")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder.

    Raises:
        CheckpointError: it holds none, or a damaged one.
    """
    _check_tokenizer(folder)
    try:
        # Where this is left out, transformers asks on the terminal whether to run foreign code.
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # as above
        raise CheckpointError(f"{folder}: the tokenizer {_why(error)}") from None
    return loaded


def _why(error: Exception) -> str:
    if "trust_remote_code" in str(error):  # transformers' own words advise to run it
        return "wants Python code of that folder, which is never run; give another tokenizer folder"
    return f"cannot be loaded: {error}"


def _check_tokenizer(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"tokenizer folder {folder} does not exist")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(
            f"{folder} holds no tokenizer (tokenizer.json or tokenizer.model); the released "
            "CogVLM repositories carry none: give lmsys/vicuna-7b-v1.5's folder as the tokenizer"
        )
