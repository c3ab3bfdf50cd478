"""The cross-entropy that writes its gradient over the logits, against torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cogvlm_sft.model.loss_cogvlm import summed_cross_entropy


@pytest.mark.parametrize("rows", [0, 1, 64, 130])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-3)])
def test_loss_and_gradient_are_torchs(rows: int, dtype: torch.dtype, close: float) -> None:
    torch.manual_seed(0)
    found = (8 * torch.randn(rows, 97)).to(dtype).requires_grad_()
    wanted = found.detach().clone().requires_grad_()
    targets = torch.randint(0, 97, (rows,))
    loss = summed_cross_entropy(found * 1, targets) / 7  # of a product, as of the head
    other = functional.cross_entropy(wanted.float(), targets, reduction="sum") / 7
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=1e-6)
    loss.backward()
    other.backward()
    assert found.grad is not None and found.grad.dtype == dtype
    torch.testing.assert_close(found.grad, wanted.grad, rtol=close, atol=close / 100)


def test_the_gradient_stands_where_the_logits_stood() -> None:
    leaf = torch.randn(70, 11, requires_grad=True)
    logits = leaf * 1
    loss = summed_cross_entropy(logits, torch.zeros(70, dtype=torch.long))
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # silently wrong otherwise
