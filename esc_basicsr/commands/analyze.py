"""Look into networks: what their results depend on, how alike their layers are, what features they make.

  python -m esc_basicsr analyze lam --network HiT-SRF ESC --image photo.png -o DIR
  python -m esc_basicsr analyze similarity --network SwinIR-light -o DIR
  python -m esc_basicsr analyze ANALYSIS --help

A network is what 'python -m esc_basicsr bench --help' lists.
"""

import argparse

from esc_basicsr.commands import analyze_erf as erf_command
from esc_basicsr.commands import analyze_features as features_command
from esc_basicsr.commands import analyze_lam as lam_command
from esc_basicsr.commands import analyze_similarity as similarity_command
from esc_basicsr.lab.analysis.networks import add_network_arguments

_ANALYSES = {
    "lam": (lam_command, "local attribution maps and the diffusion index"),
    "erf": (erf_command, "effective receptive fields"),
    "features": (features_command, "what layers make of an image, and what a pixel attends to"),
    "similarity": (similarity_command, "how much adjacent attention layers repeat each other"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the analyses and their arguments."""
    analyses = parser.add_subparsers(dest="analysis", metavar="ANALYSIS", required=True)
    for name, (module, text) in _ANALYSES.items():
        analysis = analyses.add_parser(
            name,
            help=text,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_network_arguments(analysis)
        module.add_arguments(analysis)


def run(args: argparse.Namespace) -> int:
    """Run the analysis that was asked for."""
    module, _ = _ANALYSES[args.analysis]
    return module.run(args)
