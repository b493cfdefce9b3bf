"""Overrides that turn the demonstration recipe into a run of seconds."""

SMALL = (
    "trainer.per_device_train_batch_size=16",
    "trainer.num_generations=4",
    "trainer.max_steps=6",
    "trainer.save_steps=2",
    "evaluation.problems=4",
    "evaluation.samples=2",
    "record.completions=4",
    "task.numbers=[3]",
)
