"""`simpletuner completion`."""

from __future__ import annotations

from typing import Literal

from simpletuner.cli.main import build_app

_BASH_END = """
# What stands behind the = of a word that is no flag is the person's; and no space behind `key=`.
_simpletuner_words() {
  local at=$COMP_CWORD
  [[ ${COMP_WORDS[at]} == "=" ]] || at=$((at - 1))
  if [[ ${COMP_WORDS[at]} == "=" && ${COMP_WORDS[at-1]} != -* ]]; then
    COMPREPLY=()
    return 0
  fi
  _simpletuner "$@"
  [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
  return 0
}
complete -F _simpletuner_words simpletuner
"""

_ZSH_END = """
# Under whatever name it lies in $fpath, and where it is sourced.
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
  _cyclopts_simpletuner "$@"
else
  compdef _cyclopts_simpletuner simpletuner
fi
"""
_ENDS = {"bash": _BASH_END, "zsh": _ZSH_END, "fish": ""}


def completion(shell: Literal["bash", "zsh", "fish"], /) -> int:
    """Print a script that completes commands, options, names of environments and `key=` words. It is to be sourced.

    bash: simpletuner completion bash > ~/.local/share/bash-completion/completions/simpletuner

    zsh: simpletuner completion zsh > "${fpath[1]}/_simpletuner"

    fish: simpletuner completion fish > ~/.config/fish/completions/simpletuner.fish

    Parameters
    ----------
    shell
        Whose script.
    """
    print(build_app().generate_completion(shell=shell) + _ENDS[shell])
    return 0
