"""Extensions: experts that are added to a trained model and are told apart from it."""

import dataclasses
import re
from typing import Literal, Self

from torch import nn

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclasses.dataclass(frozen=True)
class Extension:
    """
    New experts beside the pools of every layer, under a name of their own: their weights are those whose names contain
    `extensions.NAME`, and no other weight of the model changes its name or shape.

    Args:
        name: letters, digits, "-" and "_".
        num_experts: new FFN experts of each layer; 0 is none on this side.
        num_experts_per_tok: how many of them a token uses at most. "common" has no slots of its own: there the new
            experts compete for the model's.
        num_attn_experts: new attention experts of each layer; 0 is none.
        num_attn_experts_per_tok: how many of them a token uses at most.
        mode: "group": a router of its own, which also reads what the document so far is about, with a softmax over the
            new experts and the null choice. "common": new rows in the softmax of the model's routers, which takes mass
            from the old gates (ModuleFormer, arXiv:2306.04640 section 3.3).

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    name: str
    num_experts: int = 0
    num_experts_per_tok: int = 1
    num_attn_experts: int = 0
    num_attn_experts_per_tok: int = 1
    mode: Literal["group", "common"] = "group"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(f"extension name {self.name!r} must be made of letters, digits, '-' and '_'")
        if hasattr(nn.ModuleDict, self.name) or hasattr(nn.ModuleDict(), self.name):
            raise ValueError(f"extension name {self.name!r} is an attribute of PyTorch's modules: choose another")
        if self.mode not in ("group", "common"):
            raise ValueError(f"mode={self.mode!r} of extension {self.name!r} must be 'group' or 'common'")
        for side in ("experts", "attn_experts"):
            self._validate(f"num_{side}", f"num_{side}_per_tok")
        if self.num_experts + self.num_attn_experts == 0:
            raise ValueError(
                f"extension {self.name!r} has num_experts=0 and num_attn_experts=0: give it at least one expert"
            )

    def _validate(self, count_name: str, top_k_name: str) -> None:
        count, top_k = getattr(self, count_name), getattr(self, top_k_name)
        for name, value in ((count_name, count), (top_k_name, top_k)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r} of extension {self.name!r} must be a number from 0 up")
        if count and self.mode == "group" and not 1 <= top_k <= count:
            raise ValueError(
                f"{top_k_name}={top_k} of extension {self.name!r} must be between 1 and {count_name}={count}"
            )

    @classmethod
    def of(cls, fields: object) -> Self:
        """
        From the dictionary that a config holds.

        Raises:
            ValueError: unknown or missing fields, or values that are not allowed.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(fields, dict) or "name" not in fields or set(fields) - set(names):
            raise ValueError(f"an extension is a dictionary with a name, and perhaps {', '.join(names[1:])}: {fields}")
        return cls(**fields)

    def owns(self, tensor_name: str) -> bool:
        """Whether a weight of the model belongs to this extension."""
        return f".extensions.{self.name}." in f".{tensor_name}"
