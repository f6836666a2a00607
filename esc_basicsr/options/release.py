"""Option files of the authors' release: what has another name here is read as that, or said."""

from collections.abc import Mapping
from typing import Any

# What the release registers, and this package does not -> what to do.
NOT_HERE = {
    "RealHATMSEModel": "It is the release's, for degraded photographs; RealESRNetModel has the same keys.",
    "RealHATGANModel": "It is the release's, for degraded photographs; RealESRGANModel has the same keys.",
    "DownsampleImageDataset": "Here it is DFLIPDataset, which reads an LMDB: make one by the command lmdb, "
    "and write io_backend: {type: lmdb}.",
}


def translate(options: dict[str, Any]) -> None:
    """Give what the release calls otherwise its name here, in the options themselves."""
    if options.get("model_type") == "ESRModel":
        options["model_type"] = "ESCModel"
        if isinstance(options.get("val"), dict):
            options["val"].setdefault("pad_to_window", True)  # as it evaluates
    network = options.get("network_g")
    if isinstance(network, dict) and network.get("type") in ("ESC", "ESCFP", "ESCReal"):
        network.pop("deployment", None)  # how it is exported; here a command's choice
    datasets = options.get("datasets")
    for dataset in datasets.values() if isinstance(datasets, Mapping) else ():
        if isinstance(dataset, dict) and dataset.get("type") == "DownsampleImageDataset":
            backend = dataset.get("io_backend")
            if isinstance(backend, Mapping) and backend.get("type") == "lmdb" and "dataroot_gt" in dataset:
                dataset["type"] = "DFLIPDataset"
                dataset["sources"] = [{"dataroot_gt": dataset.pop("dataroot_gt")}]
                for key in ("io_backend", "filename_tmpl"):
                    dataset.pop(key, None)
