"""``ipt-fast finetune``: go on training one task of a pre-trained model."""

from . import train

# As IPT was fine-tuned (section 4).
DEFAULTS = {"lr": 2e-5, "lr_min": 2e-5, "warmup": 0, "weight_decay": 0.0, "loss": "l1"}


def add_parser(subparsers) -> None:
    parser = train.add_training_parser(
        subparsers,
        "finetune",
        help="go on training one task of a pre-trained model",
        description="Keep one head, tail and task embedding of a model with several tasks, and train it on.",
    )
    parser.set_defaults(**DEFAULTS)
