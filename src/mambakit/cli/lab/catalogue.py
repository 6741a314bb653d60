"""`mambakit lab list`: what there is to run."""


def catalogue() -> None:
    """Show the tasks, their presets, every setting with its value there, and the models."""
    import dataclasses

    from rich.table import Table

    from mambakit.cli.console import console
    from mambakit.lab import models
    from mambakit.lab.presets import PRESETS
    from mambakit.lab.tasks import TASKS

    screen = console()
    tasks = Table("task", "what it asks", title="tasks")
    for name, task in TASKS.items():
        tasks.add_row(name, (task.__doc__ or "").split("\n")[0])
    screen.print(tasks)

    for part in ("task", "model", "training"):
        for name in TASKS if part == "task" else ("",):
            shown = name or "composite"
            values = {preset: getattr(of_tasks[shown], part) for preset, of_tasks in PRESETS.items()}
            table = Table("setting", *values, title=f"{part} settings, {shown}")
            for field in dataclasses.fields(next(iter(values.values()))):
                table.add_row(field.name, *(str(getattr(value, field.name)) for value in values.values()))
            screen.print(table)

    names = Table("model", "what it is", title="models")
    rows = [line.split("|")[1:4] for line in (models.__doc__ or "").splitlines() if line.startswith("| ")][1:]
    for name, _, text in rows:
        names.add_row(name.strip(), text.strip())
    screen.print(names)
