"""Opacus: norms and clipped gradients by ghost clipping, and by rows' gradients of each layer."""

from benchmarks._peers.harness import Method, report


def methods():
    import copy

    import torch
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
    from opacus.validators import ModuleValidator

    from benchmarks._peers.in_torch import arrays

    def wrapped(problem, ghost=True):
        ModuleValidator.validate(problem.model.train(), strict=True)  # as its PrivacyEngine does
        return GradSampleModuleFastGradientClipping(
            copy.deepcopy(problem.model).train(),
            loss_reduction="sum",
            max_grad_norm=problem.max_norm,
            use_ghost_clipping=ghost,
        )

    def norms(problem):
        model = wrapped(problem)

        def step():
            model.zero_grad()
            problem.losses(model, problem.train).sum().backward()
            return model.get_norm_sample() ** 2

        return step

    def clipping(problem, ghost=True):
        model = wrapped(problem, ghost)
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(model.parameters(), lr=0.1),
            noise_multiplier=0.0,
            max_grad_norm=problem.max_norm,
            expected_batch_size=problem.train_rows,
            loss_reduction="sum",
        )

        def step():
            optimizer.zero_grad()
            model.enable_hooks()
            losses = problem.losses(model, problem.train)
            DPTensorFastGradientClipping(model, optimizer, losses, "sum").backward()
            return [p.grad for p in model.parameters()]

        return step

    return {
        "Opacus, ghost norms": Method("squared norms", norms, lambda norms: arrays([norms])),
        "Opacus, ghost clipping": Method("clipped gradient", clipping, arrays),
        "Opacus, fast gradient clipping": Method(
            "clipped gradient", lambda problem: clipping(problem, ghost=False), arrays
        ),
    }


if __name__ == "__main__":
    from benchmarks._peers.in_torch import probes, works

    report(["opacus", "torch"], probes, works, methods)
