"""The same network with random weights, to tell what training made from what the architecture does anyway."""

import copy

import torch
import torch.nn as nn

from esc_basicsr.archs.variants import NETWORKS
from esc_basicsr.common.errors import UserError
from esc_basicsr.lab.analysis.networks import Subject
from esc_basicsr.lab.networks.by_name import build_network, give_predictors_weights, weights_of
from esc_basicsr.weights.infer import infer_network_options
from esc_basicsr.weights.read import read_weights
from esc_basicsr.weights.shipped import weights_file


def random_twin(subject: Subject) -> Subject | None:
    """Build a trained network's twin.

    Returns:
        The twin; None if the network is random itself, has no weights, or cannot be built from what its file
        says.
    """
    if subject.weights in ("random", "none"):
        return None
    named, _, with_weights = subject.name.partition(",weights=")
    if with_weights and weights_of(named) is not None:  # a file's network, with another file's weights
        return None
    net = build_network(named, subject.scale) if with_weights else _of_file(subject)
    if net is None:
        return None
    device = next(subject.net.parameters()).device
    return subject._replace(
        name=subject.network, net=net.to(device).eval().requires_grad_(False), weights="random"
    )


def _of_file(subject: Subject) -> nn.Module | None:
    torch.manual_seed(0)
    # spandrel notes what a network was built by; where it does not, the weights may be ESC's.
    model = getattr(subject.net, "model", None)
    if isinstance(model, nn.Module):
        try:
            twin = type(model)(**vars(model)["hyperparameters"])
        except (KeyError, TypeError):
            return None
        net = copy.deepcopy(subject.net)
        net.model = twin
        return net
    try:
        options = infer_network_options(read_weights(weights_file(subject.weights), "params_ema"))
    except UserError:  # no weights of ESC's
        options = None
    if options is None:
        return None
    twin = NETWORKS[options.pop("type")](**options)
    give_predictors_weights(twin)
    return twin
