"""What is installed, what is missing, and what does that cost? The facts behind `pyfused env`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from . import dispatch, extensions

_PACKAGES = {
    "torch": "",
    "numpy": "",
    "safetensors": "",
    "triton": "no Triton kernels: operators on a GPU run in plain PyTorch",
    "tokenizers": "no text in or out: `pyfused generate` needs it (pip install 'pyfused[text]')",
    "h5py": "no Keras checkpoints (pip install 'pyfused[keras]')",
    "huggingface_hub": "no presets from the Hugging Face hub (pip install 'pyfused[hub]')",
    "kagglehub": "no presets from Kaggle (pip install 'pyfused[hub]')",
}
_BACKEND_COSTS = {
    "cpu": "operators on CPU tensors run in plain PyTorch, slower",
    "triton": "only GPU tensors need it",
    "cuda": "only GPU tensors need it",
    "cudnn": "only attention on GPU tensors can use it; torch for CUDA 12.9 and newer brings it along",
    "gluon": "nothing uses it unless forced: attention for Hopper, whose forward is not faster than Triton's",
}
# What to do about an extension that is not built.
_BUILD = {"cpu": "; to have it, install with a C++ compiler", "cuda": "; to have it, install with nvcc"}


def describe() -> dict[str, Any]:
    """Versions, devices, instruction sets and backends as plain data. `missing` maps a name to the cost of its absence."""
    import pyfused

    versions, missing = {"pyfused": pyfused.__version__, "python": platform.python_version()}, {}
    for package, cost in _PACKAGES.items():
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing[package] = cost
    backends = {}
    for name in dispatch.BACKENDS:
        reason = dispatch.missing(name)
        backends[name] = reason or "available"
        if reason:
            build = _BUILD.get(name, "") if reason.endswith("is not built") else ""
            missing[f"backend {name}"] = f"{reason}: {_BACKEND_COSTS[name]}{build}"
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return {
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": {
            "supported": extensions.cpu_supported(),
            "in_use": extensions.isa(),
            "dot_products": extensions.dot_products(),
            "threads": torch.get_num_threads(),
        },
        "gpus": gpus,
        "backends": backends,
        "preferences": {device: list(order) for device, order in dispatch.PREFERENCES.items()},
        "environment": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith("PYFUSED_") or k == "TRITON_INTERPRET"
        },
        "missing": missing,
    }


def render(facts: dict[str, Any]) -> str:
    """The lines that `pyfused env` prints."""
    cpu = facts["cpu"]
    rows = [("versions", ", ".join(f"{k} {v}" for k, v in facts["versions"].items())), ("platform", facts["platform"])]
    said = (f"{name} (unproven: forced or never)" if name in extensions.UNPROVEN else name for name in cpu["supported"])
    supported = ", ".join(said) or f"none ({facts['backends']['cpu']})"
    rows.append(("cpu kernels", f"{supported}; in use: {cpu['in_use']}; threads: {cpu['threads']}"))
    if cpu["dot_products"]:
        forced = cpu["dot_products"] == cpu["in_use"]
        when = "forced" if forced else "where `pyfused tune` measured them to be faster here"
        rows.append(("dot products", f"{cpu['dot_products']}: {when}"))
    for gpu in facts["gpus"] or [None]:
        text = f"{gpu['name']}, sm_{gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB" if gpu else "none"
        rows.append(("gpu", text))
    rows += [(f"backend {name}", state) for name, state in facts["backends"].items()]
    rows += [("set", f"{k}={v}") for k, v in facts["environment"].items()]
    rows += [(f"missing: {name}", cost) for name, cost in facts["missing"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)
