"""`kto-ray completion`: what a shell needs to complete commands and options. `cli.py` puts it in its place."""

import click
from click.shell_completion import get_completion_class

from kto_ray.errors import UserError

SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script with which SHELL completes kto-ray's commands and options.

    \b
    eval "$(kto-ray completion bash)"                                  # in ~/.bashrc; zsh: in ~/.zshrc
    kto-ray completion fish > ~/.config/fish/completions/kto-ray.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click knows these shells"
    try:
        source = kind(context.find_root().command, {}, "kto-ray", "_KTO_RAY_COMPLETE").source()
    except RuntimeError as error:  # bash is too old, or not there
        raise UserError(f"SHELL: {error}") from error
    click.echo(source)
