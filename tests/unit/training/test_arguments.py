import torch

from modmoe.training import arguments
from modmoe.training.arguments import deepspeed_config, training_arguments


def test_bf16_is_autocast_unless_the_section_says_otherwise(make_run):
    run = make_run({"deepspeed": {"zero_optimization": {"stage": 1}}, "optimization.precision": "bf16"})
    assert deepspeed_config(run)["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    section = {"zero_optimization": {"stage": 1}}
    run = make_run({"deepspeed": {**section, "bf16": {"enabled": "auto"}}, "optimization.precision": "bf16"})
    assert "torch_autocast" not in deepspeed_config(run)
    assert "torch_autocast" not in deepspeed_config(make_run({"deepspeed": section}))
    assert deepspeed_config(make_run()) is None


def test_a_switched_off_bf16_part_is_no_bf16_part(make_run):
    """With it DeepSpeed would clip here and not tell the norm."""
    section = {"zero_optimization": {"stage": 0}, "bf16": {"enabled": False}}
    for precision in ("fp32", "bf16"):
        run = make_run({"deepspeed": section, "optimization.precision": precision})
        assert deepspeed_config(run)["gradient_clipping"] == 0.0
        assert ("torch_autocast" in deepspeed_config(run)) == (precision == "bf16")


def test_an_offloaded_optimizer_stays_the_one_of_the_config(make_run):
    """accelerate would replace it by one that is compiled at the start and does not resume exactly."""
    section = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert deepspeed_config(make_run({"deepspeed": section}))["zero_force_ds_cpu_optimizer"] is False


def test_a_process_uses_one_gpu(make_run, monkeypatch):
    """With more the Trainer would multiply the batch, and split what cannot be split."""
    monkeypatch.setattr(arguments, "device_type", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    run = make_run()
    args = training_arguments(run)
    assert args.n_gpu == 1
    assert args.train_batch_size == run.optimization.micro_batch_size
    assert args.dataloader_pin_memory
    assert args.accelerator_config.non_blocking
