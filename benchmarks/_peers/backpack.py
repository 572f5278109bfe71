"""BackPACK: norms by BatchL2Grad; dots of BatchGrad's gradients with the validation gradient."""

from benchmarks._peers.harness import Method, report


def methods():
    import copy

    import torch
    from backpack import backpack, extend, extensions

    from benchmarks._peers.in_torch import arrays

    def made(model, field):
        """The field of every parameter; without an extension BackPACK warns, and makes none."""
        missing = [name for name, p in model.named_parameters() if not hasattr(p, field)]
        if missing:
            raise NotImplementedError(f"no {field} of {', '.join(missing)}")
        return [getattr(p, field) for p in model.parameters()]

    def norms(problem):
        model = extend(copy.deepcopy(problem.model))

        def step():
            model.zero_grad()
            with backpack(extensions.BatchL2Grad()):
                problem.losses(model, problem.train).sum().backward()
            return sum(made(model, "batch_l2"))

        return step

    def dots(problem):
        model = extend(copy.deepcopy(problem.model))

        def step():
            model.zero_grad()
            problem.losses(model, problem.val).mean().backward()
            direction = [p.grad for p in model.parameters()]
            model.zero_grad()
            with backpack(extensions.BatchGrad()):
                problem.losses(model, problem.train).sum().backward()
            pairs = zip(made(model, "grad_batch"), direction)
            dots = sum(torch.flatten(rows, 1) @ grad.flatten() for rows, grad in pairs)
            for parameter in model.parameters():
                del parameter.grad_batch
            return dots

        return step

    return {
        "BackPACK, BatchL2Grad": Method("squared norms", norms, lambda norms: arrays([norms])),
        "BackPACK, BatchGrad": Method("dots", dots, lambda dots: arrays([dots])),
    }


if __name__ == "__main__":
    from benchmarks._peers.in_torch import probes, works

    report(["backpack-for-pytorch", "torch"], probes, works, methods)
