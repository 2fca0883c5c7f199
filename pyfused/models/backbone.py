"""What do all models share? They are made from a configuration or a preset, which gives their class and dtype."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ..checkpoints import open_checkpoint, presets_of, save_to_preset
from ..evidence import name_of
from ..families import FAMILIES, Family, families_of, load
from ..nn.quantized import dtype_of
from ..quantize import hold_integers_
from ..rules import FLAG, check
from .dtypes import MIXED, resolve_dtype, resolve_policy
from .loading import Uninitialised, allocate, place_of
from .mixed_precision import compute_in

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Self


def model_names(cls: type) -> set[str]:
    """The checkpoints' names of the models that ``cls`` can hold. Backbone itself can hold all."""
    if cls is Backbone:
        return set(FAMILIES)
    return {family.name for family in families_of(cls)}


class _Presets:
    """Makes ``presets`` a class attribute, as in KerasHub."""

    def __get__(self, instance: object, owner: type) -> dict[str, dict[str, Any]]:
        return presets_of(model_names(owner))


class Backbone(nn.Module, ABC):
    """A transformer without a task: token ids in, hidden states out. Subclasses take their sizes as keywords.

    ``presets``: name to metadata of the published and bundled presets that this class can load.
    ``skip_padding``: False computes padding like any token, as the references do. True leaves padding out, so that a batch
    which is half padding costs half. Real tokens get the same values, padding gets zeros. On a GPU this synchronises once a
    call. In torch.compile's traces, with dense biases, with a filled cache, and if attentions are returned, padding cannot
    be left out: it is computed, then set to zeros.
    """

    skip_padding = False
    begins_with_cls = False  # whether a text's first token stands for all of it, as BERT's [CLS]

    presets = _Presets()
    texts = Family.texts  # a call's inputs for each text; a family with others says so in its row
    predicts_tokens = True  # whether the backbone has `logits`; an encoder's head is not part of it
    token_embedding: Any  # nn.ReversibleEmbedding: ids -> vectors; with reverse=True hidden states -> logits

    preset_directory: Path | None = None  # where from_preset found the files, for save_to_preset
    _config: dict[str, Any]  # the constructor's arguments without the dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computation and outputs. It is the parameters' dtype, except under a mixed policy of Keras."""
        return dtype_of(self.token_embedding)

    @property
    def device(self) -> torch.device:
        return self.token_embedding.weight.device

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON types. `from_config` makes an equal, untrained model from them."""
        name = name_of(self.dtype)
        mixed = next(self.parameters()).dtype != self.dtype
        return {**self._config, "dtype": f"mixed_{name}" if mixed else name}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new weights, as the class's docstring says."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, self._spread(name, parameter))

    def _spread(self, name: str, parameter: torch.Tensor) -> float:
        """The standard deviation of a new weight."""
        return 0.02

    @abstractmethod
    def text_states(self, token_ids: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """The hidden states of texts alone, without other inputs: (B, S), (B, S) or None -> (B, S, D)."""

    def tensor_parallel_plan(self) -> dict[str, Any]:
        """The plan for torch.distributed.tensor.parallel.parallelize_module: {a module's name: its ParallelStyle}.

        Each rank gets some heads of every attention, some features of every feed-forward network and some rows of the token
        table, and copies of the rest. Outputs are whole on every rank, and so are inputs: give all ranks the same. If there
        is dropout, seed all ranks alike. Wrap in fully_shard afterwards, if at all. Applying it raises ValueError, before
        anything has changed, where the number of ranks does not divide num_heads or intermediate_dim.
        """
        from ..nn.tensor_parallel import styles_of

        names = ("num_heads", "intermediate_dim")
        return dict(styles_of(self, {name: self._config[name] for name in names if name in self._config}))

    def blocks(self) -> list[nn.Module]:
        """The layers with weights of their own, of all stacks: what torch.distributed.fsdp.fully_shard takes one at a time."""
        lists = (m for m in self.modules() if isinstance(m, nn.ModuleList))
        return [block for found in lists for block in found if not isinstance(block, nn.ModuleList)]

    def full_state_dict(self, *, keep: bool = True) -> dict[str, torch.Tensor]:
        """The state dict of the same model on one device, on the CPU, whatever spreads this one: a mesh, fully_shard, both or
        nothing. All ranks must call it, since they gather one tensor after the other. keep=False returns an empty dict, for the
        ranks that write no file."""
        from ..nn.tensor_parallel import full_state_dict

        return full_state_dict(self, keep=keep)

    def check_decoder(self, what: str) -> None:
        """Raises ValueError if this is an encoder alone. `what` names the feature that needs the decoder."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., D) -> the logits of the next token, (..., V). TypeError for an encoder."""
        if not self.predicts_tokens:
            raise TypeError(
                f"{type(self).__name__} gives hidden states; the head that makes logits of them is no part of it: call "
                f"token_embedding(x, reverse=True) with the output of a head"
            )
        return self.token_embedding(hidden, reverse=True)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A model with new weights from the result of `get_config`."""
        if not isinstance(config, Mapping):
            raise TypeError(f"config is of type {type(config).__name__}; it takes a dict of constructor arguments")
        if config.get("dtype") not in MIXED:
            return cls(**config)
        variable, compute = resolve_policy(config["dtype"])
        model = cls(**{**config, "dtype": variable})
        compute_in(model, compute)
        return model

    @classmethod
    def from_preset(
        cls,
        preset: str | os.PathLike[str],
        load_weights: bool = True,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        skip_padding: bool = False,
        mesh: DeviceMesh | None = None,
        **overrides: Any,
    ) -> Self:
        """The model of a preset, in evaluation mode.

        preset: a bundled name, a local directory in Hugging Face or Keras format, a KerasHub name, hf://owner/repo[@revision]
        or kaggle://...; see `pyfused.checkpoints.resolve_preset`. Backbone.from_preset takes the checkpoint's class.
        load_weights: False reads the configuration alone and keeps random weights.
        device: where the weights go; None is torch's default device.
        dtype: a name or a torch.dtype, or "mixed_float16" or "mixed_bfloat16": float32 parameters, which are cast for each
            computation, and outputs in the other dtype. None takes the checkpoint's, which may be a mixed policy of Keras.
        skip_padding: the attribute of this name; see the class.
        mesh: a device mesh of one dimension, over whose ranks the model is spread by `tensor_parallel_plan`. All ranks call
            this. Each reads its own part of the files alone, and holds no more. `device` is then the mesh's.
        overrides: constructor arguments in place of the checkpoint's, such as dropout=0.0.

        Memory peaks near one copy of the weights. Raises ValueError for a checkpoint of another model, an unknown
        override, and everything that `open_checkpoint` refuses. No partly loaded model is returned.
        """
        check(FLAG, skip_padding=skip_padding)
        target = None if dtype is None else resolve_policy(dtype)
        checkpoint = open_checkpoint(preset, weights=load_weights)
        if checkpoint.model not in model_names(cls):
            raise ValueError(
                f"preset {str(preset)!r} is a {checkpoint.model} checkpoint; {cls.__name__} takes "
                f"{', '.join(sorted(model_names(cls))) or 'none'}"
            )
        known = [*checkpoint.config, "name", "trainable"]
        if unknown := sorted(set(overrides) - set(known)):
            raise ValueError(f"overrides: unknown {unknown}; they take {', '.join(known)}")
        kind: Any = load(FAMILIES[checkpoint.model].backbone) if cls is Backbone else cls
        if skip_padding and kind.texts[0][1] is None:
            raise ValueError(f"skip_padding is True; a {kind.__name__} has no padding, and takes False")
        variable, compute = target or (checkpoint.dtype, checkpoint.compute_dtype)
        config = checkpoint.config_with(overrides) | {"dtype": variable}
        if checkpoint.integers and (variable is torch.float64 or compute != variable):
            takes = f"a checkpoint with {checkpoint.variant} weights takes float32, float16 or bfloat16"
            raise ValueError(f"dtype is {dtype!r}; {takes}")
        place = place_of(device, mesh)
        if mesh is not None and (checkpoint.integers or not load_weights):
            what = f"the weights are {checkpoint.variant}" if checkpoint.integers else "load_weights is False"
            raise ValueError(f"mesh is given and {what}; it takes a model whose floating-point weights are loaded")
        if not load_weights:
            with place, Uninitialised() if place.type == "meta" else nullcontext():
                model = kind.from_config(config)
            model.preset_directory = checkpoint.directory
            return _finished(model, variable, compute, skip_padding)
        with torch.device("meta"), Uninitialised():
            model = kind.from_config(config)
            hold_integers_(model, checkpoint.integers)
        checkpoint.check_module(model)
        bare = {name for name, _ in (*model.named_parameters(), *model.named_buffers())} - model.state_dict().keys()
        if bare:
            raise RuntimeError(
                f"{kind.__name__}: {sorted(bare)} are not in its state dict, so that nothing would fill them"
            )
        if mesh is not None:
            from torch.distributed.tensor.parallel import parallelize_module

            parallelize_module(model, mesh, model.tensor_parallel_plan(), src_data_rank=None)
        allocate(model, place)
        checkpoint.load_into(model)
        model.preset_directory = checkpoint.directory
        return _finished(model, variable, compute, skip_padding)

    def save_to_preset(
        self,
        directory: str | os.PathLike[str],
        format: Literal["hf", "keras"] = "hf",
        dtype: str | torch.dtype | None = None,
        max_shard_size: int | str = "10GB",
        tokenizer: Any = None,
    ) -> None:
        """Writes configuration, weights and tokeniser for transformers ("hf") or KerasHub ("keras"). pyfused reads both.

        directory: is made if needed. Its checkpoint is replaced all at once: a process that is killed leaves the old one or
            the new one. Other files in it stay.
        dtype: of the saved weights, a name or a torch.dtype. None keeps the model's, a mixed policy included if the format is
            Keras's; Hugging Face's has none.
        max_shard_size: the most bytes of a weight file, or a str such as "10GB" or "500MB". A larger tensor gets its own file.
        tokenizer: None takes the files of the preset that the model came from, if there are any. A preset's name, a directory,
            or a pyfused Tokenizer brings others; False saves none. Files of the other format are converted, or left out with
            a warning.

        Integer weights of `quantize_` are saved in pyfused's own form of Hugging Face's format, which only `from_preset` reads.
        Memory peaks at the model and a few MB. Raises ValueError for an argument that the format cannot express, OSError if the
        files cannot be written; the directory is then as before. Raises ImportError without h5py for "keras".
        """
        save_to_preset(
            self, directory, format, None if dtype is None else resolve_dtype(dtype), max_shard_size, tokenizer
        )


def _finished(model: Any, variable: torch.dtype, compute: torch.dtype, skip_padding: bool) -> Any:
    if compute != variable:
        compute_in(model, compute)
    model.skip_padding = skip_padding
    return model.eval()
