"""Which parameters a fine-tuning run trains; all others stay bit for bit what they are."""

from modmoe.models import ModMoEForCausalLM
from modmoe.surgery.extend import train_only
from modmoe.training.errors import ConfigError
from modmoe.training.finetuning.config import FinetuningSection


def choose_parameters(model: ModMoEForCausalLM, tuning: FinetuningSection) -> None:
    """
    Set `requires_grad` of every parameter, as the method says; "lora" is the business of `lora`.

    Raises:
        ConfigError: if the model has no such part.
    """
    if tuning.method in ("full", "lora"):
        return
    if tuning.method == "extension":
        try:
            train_only(model, tuning.extensions)
        except ValueError as error:
            raise ConfigError(f"finetuning.extensions: {error}") from None
        return
    pools = model.routed_pools()
    if not pools:
        raise ConfigError(f"finetuning.method={tuning.method!r} needs a model with routers, and all layers are dense")
    chosen = {p for router, experts in pools for p in (router if tuning.method == "routers" else experts).parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in chosen)
