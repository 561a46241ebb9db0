"""`modellink models`: the presets that `--model` takes, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from modellink.errors import ModelLinkError


def run(argv: Sequence[str]) -> int:
    """Print the table; `modellink models NAME` prints one preset field by field."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from modellink.models.count import count_parameters
    from modellink.models.presets import preset, preset_fields, presets

    names = [text for text in argv if not text.startswith("-")]
    if any(text in ("-h", "--help") for text in argv):
        print("usage: modellink models [NAME]\n\nList the presets of --model NAME, or the fields of one.")
        return 0
    flags = [text for text in argv if text.startswith("-") and text != "--debug"]
    if flags or len(names) > 1:
        raise ModelLinkError(f"models takes at most one preset name, not {' '.join(argv)}.")
    # without inner rules the table fits into 80 columns
    table = Table(title=names[0] if names else "presets for --model NAME", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    if names:
        table.add_column("field")
        table.add_column("value")
        for field, value in preset_fields(names[0]).items():
            table.add_row(field, str(value))
    else:
        for column in ("preset", "family", "size", "layers", "hidden", "heads", "KV", "MLP", "vocab"):
            table.add_column(column, justify="left" if column in ("preset", "family") else "right", no_wrap=True)
        for name in presets:
            model = preset(name)
            count = count_parameters(model)
            heads = (model.num_attention_heads, model.num_key_value_heads)
            sizes = (model.num_layers, model.hidden_size, *heads, model.ffn_hidden_size, model.vocab_size)
            shown = f"{count / 1e9:.2f}B" if count >= 1e7 else f"{count / 1e6:.2f}M"
            table.add_row(name, model.family, shown, *map(str, sizes))
    Console().print(table)
    return 0
