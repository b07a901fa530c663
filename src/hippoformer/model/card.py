"""The model card of a checkpoint: what it is, on which base, with which options, and how to load it.

Written beside the weights where there is none yet, and pushed with them. Everything in it is read off the model; what
only the author knows (the texts it was trained on, the licence) is left for the author to add.
"""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from hippoformer.model.base_models import is_repository
from hippoformer.model.pinned_models import PINNED_MODELS
from hippoformer.model.pretrained import HippoFormerPreTrainedModel as Model

_TEMPLATE = """---
{metadata}
---

# {title}

A hippocampus for {base}: a bounded episodic memory inside a language model, which reads text of any length in constant
space. Inside: {contents}.

| | |
| --- | --- |
{facts}

## How to load it

```python
import hippoformer
from hippoformer.text import encode

model, tokenizer = hippoformer.load("{name}")
cache = model.new_cache(batch_size=1)  # all that will be remembered
ids = encode(tokenizer, "Some long text.", bos=True)
print(tokenizer.decode(model.generate(ids, past_key_values=cache, max_new_tokens=20)[0]))
```

`AutoModelForCausalLM.from_pretrained("{name}")` works as well once `hippoformer` is imported. {where_the_base_is}
"""


def base_repository(name: str) -> str | None:
    """The hub repository that a base model's name stands for, or None for a local folder."""
    if name in PINNED_MODELS:
        return PINNED_MODELS[name].hub_repository
    return None if Path(name).expanduser().is_dir() or not is_repository(name) else name


def model_card(model: Model, name: str) -> ModelCard:
    """The card of a model that is about to be saved.

    Args:
        name: what to load it by: a hub repository, or a folder.
    """
    config = model.config
    own_base = not config.freeze_base and config.lora is None
    repository = base_repository(config.base_model_name)
    data = ModelCardData(
        base_model=repository,
        base_model_relation=None if repository is None else "finetune" if own_base else "adapter",
        library_name="hippoformer",
        pipeline_tag="text-generation",
        tags=["hippoformer", "memory", "long-context", *(["lora"] if config.lora is not None else [])],
    )
    shown = config.base_model_name if repository is not None else Path(config.base_model_name).name
    contents = ["the hippocampus", *(["LoRA adapters"] if config.lora is not None else [])]
    added = [*model.hippocampus.parameters()]
    added += [parameter for name, parameter in model.base.named_parameters() if "lora_" in name]
    facts = {
        "base": f"`{shown}`, {'trained along' if own_base else 'frozen'}",
        "parameters besides the base's": f"{sum(parameter.numel() for parameter in added):,}",
        "memory": "trained" if model.hippocampus.fusion.is_trained else "untrained",
        "window, sinks, segment": f"{config.window}, {config.sink_tokens}, {config.segment_len} tokens",
        "episodes of a row": f"{config.buffer_size:,}, chosen by {config.selection}",
        "keys": f"{config.recall_n_heads} heads x {config.recall_head_dim}, of layer {config.memory_layer}",
    }
    where = "The base is fetched from where its name says."
    if own_base:
        where = "The base comes along, in the folder `base`."
    elif repository is None:
        where = f"The base is a local folder, `{shown}`, that is on no hub: give it as `base_model=`."
    return ModelCard(
        _TEMPLATE.format(
            metadata=data.to_yaml(),
            title=name.rstrip("/").split("/")[-1],
            base=f"[{shown}](https://huggingface.co/{repository})" if repository else f"`{shown}`",
            contents=", ".join([*contents, "the base, whose weights were trained" if own_base else "not the base"]),
            facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
            name=name,
            where_the_base_is=where,
        )
    )
