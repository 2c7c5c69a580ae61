"""A trained model as a plain Hugging Face checkpoint folder, in bf16."""

import json
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from models.training.checkpoint import Progress
from models.training.shapes import num_parameters

TRAINING_FACTS = "training.json"


def export_model(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    progress: Progress,
    folder: Path,
) -> LlamaForCausalLM:
    """Write the checkpoint in bf16 and `training.json`; return the model as stored.

    The returned fp32 model carries the weights rounded to bf16, so that what is measured is what
    ships.
    """
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.do_sample = False
    export_checkpoint(model, tokenizer, folder)
    facts = {
        "num_parameters": num_parameters(model),
        "num_steps": progress.step,
        "num_tokens": progress.num_tokens,
        "wall_clock_s": round(progress.wall_clock_s),
        "recipe": progress.recipe,
    }
    (folder / TRAINING_FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    return load_model(folder)


def export_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write config, weights (in the type they have), tokenizer and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    generation = model.generation_config
    if generation is not None and generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
        generation.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    # safetensors writes files that only their owner may read.
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
    tokenizer.save_pretrained(folder)
    template = tokenizer.get_chat_template()
    (folder / "chat_template.jinja").write_text(template)
    _name_tokenizer_class(folder / "tokenizer_config.json")


def _name_tokenizer_class(path: Path) -> None:
    """Write the class name that transformers 4 and 5 both know."""
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")


def load_model(folder: Path) -> LlamaForCausalLM:
    """The checkpoint in `folder` in fp32, ready for inference."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    model.eval()  # type: ignore[no-untyped-call]
    return model
