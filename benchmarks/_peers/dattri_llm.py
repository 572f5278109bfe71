"""dattri-llm: its scores of training rows in a run, by DataSelectionCallback, dropping none."""

from benchmarks._peers.harness import Method, report


def methods():
    import copy

    from dattri_llm import DataSelectionCallback, HookManager

    from benchmarks._peers.in_torch import arrays

    def dots(problem, model=None):
        model = model or copy.deepcopy(problem.model)
        scores = DataSelectionCallback(
            model,
            target="val_loader",
            val_loader=[problem.val],
            val_loss_fn=lambda model, rows: problem.losses(model, rows).mean(),
            selection_kwargs={"threshold": float("-inf")},
        )
        manager = HookManager(model, callbacks=[scores])

        def step():
            model.zero_grad()
            scores.last_scores = None
            with manager.collect():
                problem.losses(model, problem.train).mean().backward()
            if scores.last_scores is None:
                raise RuntimeError("no scores: the step was never complete for its hooks")
            return scores.last_scores * problem.train_rows  # of row losses, not of their mean

        return step

    return {
        "dattri-llm, DataSelectionCallback": Method("dots", dots, lambda dots: arrays([dots])),
    }


if __name__ == "__main__":
    from benchmarks._peers.in_torch import probes, works

    report(["dattri-llm", "torch"], probes, works, methods)
