"""What a run sets up around its steps."""

from modmoe.ops.backend import requested_backend
from modmoe.training import pretraining


def test_the_backend_of_the_config_is_the_ops_own(make_run, monkeypatch):
    seen = []
    monkeypatch.setattr(
        pretraining, "_carry_out", lambda *_: seen.append(requested_backend("op", None, ("cpp", "torch")))
    )
    for backend in ("torch", None):
        pretraining.pretrain(make_run({"backend": backend}))
    assert seen == ["torch", "auto"]
