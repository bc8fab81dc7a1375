"""What a report costs: a step of AdamW with ``report=True`` against one without, in turns in one process.

Run it as ``python -m bench.reported --workload gpt2-124m``. Both sides have parameters and gradients of their own,
equal at the start; the ratio is the median over the rounds, with the quartiles.
"""

from __future__ import annotations

import argparse
import statistics

import torch

import fusedopt
from bench.phase import SETTINGS, Side, make_params, measure
from bench.workloads import load

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def stepping_side(shapes: list[tuple[int, ...]], dtype: torch.dtype, *, report: bool) -> Side:
    """A step with or without a report."""
    params = [torch.nn.Parameter(param.detach().to(dtype)) for param in make_params(shapes, "cpu")]
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer = fusedopt.AdamW(params, report=report, **SETTINGS)
    return Side("report" if report else "plain", optimizer.step, params)


def main() -> None:
    """Reads the command line, measures, checks that the sides arrived at the same bits, and prints."""
    parser = argparse.ArgumentParser(description="What a report costs: a step with report=True against one without.")
    parser.add_argument("--workload", default="gpt2-124m", help="COUNTxNUMEL or a name (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=31, help="turns that are measured (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the parameters (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = [shape for group in load(arguments.workload).groups for shape in group.shapes()]
    sides = [stepping_side(shapes, DTYPES[arguments.dtype], report=report) for report in (False, True)]
    grads = [torch.randn_like(param) for param in sides[0].params]
    taken = measure(sides, grads, arguments.rounds)
    for one, other in zip(sides[0].params, sides[1].params, strict=True):
        if not torch.equal(one, other):
            raise SystemExit("the sides did not arrive at the same parameters")
    low, ratio, high = statistics.quantiles([row[1] / row[0] for row in taken], n=4)
    plain, reported = (statistics.median(column) for column in zip(*taken, strict=True))
    print(f"{arguments.workload}, {arguments.dtype}, {arguments.threads} threads, {arguments.rounds} rounds:")
    print(f"  a step {plain * 1e3:.1f} ms, with a report {reported * 1e3:.1f} ms")
    print(f"  ratio {ratio:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
