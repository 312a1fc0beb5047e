import pytest
import torch
from torch import nn

from modmoe.distill.ranges import stage_specs
from modmoe.distill.stitch import Projection, build_stitches, principal_projection

FIRST, MIDDLE, LAST = stage_specs([(0, 1), (1, 2), (2, 3)], 16)


def states() -> list[torch.Tensor]:
    """In a plane of 16 dimensions, up to noise, with lengths that differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(16, 2, generator=generator)).Q
    rows = torch.randn(40, 2, generator=generator) @ plane.T + 1e-3 * torch.randn(40, 16, generator=generator)
    return [rows[:20] * 1000, rows[20:], plane.T]


def test_the_projection_spans_the_principal_directions():
    projection = principal_projection(states(), 2)
    torch.testing.assert_close(projection.T @ projection, torch.eye(2))
    plane = states()[-1].T
    torch.testing.assert_close(plane @ plane.T, projection @ projection.T, atol=1e-2, rtol=0)
    assert torch.equal(projection, principal_projection(states(), 2))


def test_out_of_one_stage_and_into_the_next_is_nothing():
    projection = principal_projection(states(), 12)
    _, after = build_stitches(FIRST, 12, "projection", projection)
    before, _ = build_stitches(MIDDLE, 12, "projection", projection)
    hidden = torch.randn(2, 3, 12)
    assert after(hidden).shape == (2, 3, 16)
    torch.testing.assert_close(before(after(hidden)), hidden)
    assert not list(before.parameters())


def test_equal_widths_need_no_projection():
    assert all(isinstance(s, nn.Identity) for s in build_stitches(MIDDLE, 16, "projection"))


@pytest.mark.parametrize("kind", ["projection", "linear"])
def test_the_ends_of_the_model_have_no_stitch(kind):
    projection = principal_projection(states(), 12)
    assert isinstance(build_stitches(FIRST, 12, kind, projection)[0], nn.Identity)
    assert isinstance(build_stitches(LAST, 12, kind, projection)[1], nn.Identity)
    kinds = Projection if kind == "projection" else nn.Sequential
    assert all(isinstance(s, kinds) for s in build_stitches(MIDDLE, 12, kind, projection))


def test_linear_stitches_learn_and_fit_any_width():
    for width in (8, 16, 24):
        before, after = build_stitches(MIDDLE, width, "linear")
        assert after(before(torch.randn(2, 16))).shape == (2, 16)
        assert len(list(before.parameters())) == 2


def test_stitches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="stitch='glue' must be one of projection, linear"):
        build_stitches(MIDDLE, 16, "glue")
    with pytest.raises(ValueError, match="width 24 is larger than the teacher's 16.*use stitch='linear'"):
        build_stitches(MIDDLE, 24, "projection")
    with pytest.raises(ValueError, match=r"needs a projection of shape \(16, 12\), got none"):
        build_stitches(MIDDLE, 12, "projection")
    with pytest.raises(ValueError, match=r"got one of shape \(16, 8\)"):
        build_stitches(MIDDLE, 12, "projection", principal_projection(states(), 8))
    with pytest.raises(ValueError, match="width=17 must be between 1 and .* 16"):
        principal_projection(states(), 17)
    with pytest.raises(ValueError, match="no hidden states"):
        principal_projection([], 2)
