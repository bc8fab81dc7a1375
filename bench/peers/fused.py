"""fusedopt, once for each of its backends."""

from __future__ import annotations

from functools import partial

from bench.peers.peer import Hyper, Optimizer, ParamGroups, Peer


def make(groups: ParamGroups, hyper: Hyper, backend: str) -> Optimizer:
    """An optimizer of fusedopt on one backend."""
    import fusedopt

    classes = {"adamw": fusedopt.AdamW, "adam": fusedopt.Adam, "sgd": fusedopt.SGD}
    optimizer: Optimizer = classes[hyper.optimizer](groups, **hyper.keywords(), backend=backend)
    return optimizer


def unavailable(device: str, backend: str) -> str | None:
    """Why a backend cannot run on a device type here, or None."""
    if backend == "triton" and device == "cpu":
        return "on a CPU Triton has only its interpreter, too slow to time"
    try:
        import fusedopt

        backends = fusedopt.available_backends(device)
    except Exception as error:  # an installation that does not import is a reason, not a crash
        return f"fusedopt does not import: {type(error).__name__}: {error}"
    if backend not in backends:
        return f"fusedopt has no {backend} backend for {device} here, only {', '.join(backends) or 'none'}"
    return None


def launches() -> int:
    """Launches of this process so far."""
    import fusedopt

    return int(fusedopt.launch_count())


PEERS = [
    Peer(
        f"fusedopt-{backend}",
        partial(make, backend=backend),
        devices=devices,
        unavailable=partial(unavailable, backend=backend),
        launches=launches,
        most_elements=50_000_000 if backend == "reference" else None,
    )
    for backend, devices in (
        ("cpu", ("cpu",)),
        ("cuda", ("cuda",)),
        ("triton", ("cpu", "cuda")),
        ("reference", ("cpu", "cuda")),
    )
]
