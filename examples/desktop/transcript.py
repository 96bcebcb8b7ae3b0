"""The view of a conversation."""

from __future__ import annotations

import tkinter as tk
from tkinter import ttk
from typing import Any

from conversations import Conversation
from look import Colours, Fonts

_SIDE, _GAP = 28, 12
_NAMES = {"user": "You", "assistant": "Model", "system": "System"}


class Transcript(ttk.Frame):
    """A list of messages, those of the user on a tinted background. Scrolls to new text unless the user scrolled up."""

    def __init__(self, parent: tk.Misc, fonts: Fonts) -> None:
        super().__init__(parent)
        bar = ttk.Scrollbar(self, orient="vertical")
        self._text = tk.Text(self, wrap="word", bd=0, highlightthickness=0, padx=0, pady=8, state="disabled", width=40)
        self._text.configure(font=fonts.text, cursor="arrow", yscrollcommand=bar.set, spacing2=3)
        bar.configure(command=self._text.yview)
        self._text.pack(side="left", fill="both", expand=True)
        bar.pack(side="right", fill="y")
        self._fonts = fonts

    def paint(self, colours: Colours) -> None:
        """Use these colours."""
        self._text.configure(
            background=colours.ground,
            foreground=colours.text,
            selectbackground=colours.accent,
            selectforeground=colours.on_accent,
        )
        for role, ground in {"user": colours.mine, "assistant": colours.ground, "system": colours.side}.items():
            around: dict[str, Any] = {"lmargin1": _SIDE, "lmargin2": _SIDE, "rmargin": _SIDE, "background": ground}
            around |= {"lmargincolor": ground, "rmargincolor": ground}
            name = colours.accent if role == "assistant" else colours.weak
            self._text.tag_configure(role, **around)
            self._text.tag_configure(
                _name_of(role), font=self._fonts.bold, foreground=name, spacing1=_GAP, spacing3=_GAP // 3, **around
            )
            self._text.tag_configure(_end_of(role), font=self._fonts.small, spacing1=0, spacing3=0, **around)
        self._text.tag_configure("hint", lmargin1=_SIDE, lmargin2=_SIDE, rmargin=_SIDE)
        self._text.tag_configure("hint", foreground=colours.weak, font=self._fonts.small, spacing1=_GAP)
        self._text.tag_raise("sel")

    def show(self, conversation: Conversation, hint: str) -> None:
        """Show a conversation. hint: text for an empty one."""
        self._change("1.0", "end")
        for message in conversation.messages:
            self.begin(message["role"])
            self.add(message["role"], message["content"])
        if not conversation.messages:
            self._change("end", None, hint, "hint")
        self._text.see("end")

    def begin(self, role: str) -> None:
        """Start a message."""
        if self._text.tag_ranges("hint"):
            self._change("1.0", "end")
        if self._text.index("end-1c") != "1.0":
            last = "assistant" if role == "user" else "user"
            self._change("end", None, "\n", last)
            self._change("end", None, "\n", _end_of(last))
        self._change("end", None, f"{_NAMES.get(role, role)}\n", _name_of(role))

    def add(self, role: str, text: str) -> None:
        """Add text to the last message."""
        follows = self._text.yview()[1] >= 0.999
        self._change("end", None, text, role)
        if follows:
            self._text.see("end")

    def note(self, text: str) -> None:
        """Show a note below the last message."""
        self._change("end", None, f"\n{text}", "hint")
        self._text.see("end")

    def _change(self, begin: str, end: str | None, text: str = "", tag: str = "") -> None:
        self._text.configure(state="normal")
        if end is not None:
            self._text.delete(begin, end)
        if text:
            self._text.insert("end", text.replace("\0", "\ufffd"), tag)  # Tk ends a string at \0
        self._text.configure(state="disabled")


# Tag names have no spaces, because Tk splits them at spaces.
def _name_of(role: str) -> str:
    return f"{role}-name"


def _end_of(role: str) -> str:
    return f"{role}-end"
