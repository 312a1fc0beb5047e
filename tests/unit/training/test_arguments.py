from modmoe.training.arguments import deepspeed_config


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
