"""Colours and fonts of the window, light and dark."""

from __future__ import annotations

import sys
import tkinter as tk
from dataclasses import dataclass
from tkinter import font, ttk
from typing import Any

_FAMILIES = ("Inter", "Segoe UI", "SF Pro Text", "Cantarell", "Noto Sans", "DejaVu Sans")


@dataclass(frozen=True)
class Colours:
    """ground: background of the conversation; side: of list and bars; mine: of the user's messages; weak: small print;
    line: between areas; accent: buttons and progress; chosen: selected rows."""

    ground: str
    side: str
    mine: str
    text: str
    weak: str
    line: str
    accent: str
    on_accent: str
    chosen: str


LIGHT = Colours("#ffffff", "#f4f5f7", "#eef2fb", "#1d2129", "#6a7280", "#dfe2e8", "#2f5fd0", "#ffffff", "#e0e7f7")
DARK = Colours("#1b1d22", "#141619", "#262b36", "#e7e9ee", "#939bab", "#2c3038", "#7aa2f7", "#10131a", "#2a3142")


class Fonts:
    """One font family in three sizes."""

    def __init__(self, window: tk.Misc) -> None:
        there = set(font.families(window))
        family = next((name for name in _FAMILIES if name in there), font.nametofont("TkDefaultFont").cget("family"))
        self.text = font.Font(window, family=family, size=11)
        self.small = font.Font(window, family=family, size=9)
        self.bold = font.Font(window, family=family, size=10, weight="bold")


def sharpen() -> None:
    """Make Windows draw the window at the screen's native resolution. Call before creating a window."""
    if sys.platform == "win32":
        import ctypes

        ctypes.windll.shcore.SetProcessDpiAwareness(1)


def style(window: tk.Misc, colours: Colours, fonts: Fonts) -> None:
    """Apply colours and fonts to ttk widgets."""
    found = ttk.Style(window)
    found.theme_use("clam")
    found.configure(
        ".", background=colours.side, foreground=colours.text, font=fonts.text, bordercolor=colours.line, borderwidth=0
    )
    found.configure("Small.TLabel", foreground=colours.weak, font=fonts.small)
    found.configure("Bold.TLabel", font=fonts.bold)
    found.configure("Line.TFrame", background=colours.line)
    found.configure("TButton", background=colours.side, padding=(12, 7), relief="flat", focuscolor=colours.side)
    found.map("TButton", background=[("active", colours.chosen)], foreground=[("disabled", colours.weak)])
    found.configure("Main.TButton", background=colours.accent, foreground=colours.on_accent, font=fonts.bold)
    found.map(
        "Main.TButton",
        background=[("disabled", colours.line), ("active", colours.accent)],
        foreground=[("disabled", colours.weak)],
    )
    found.configure(
        "TCombobox",
        fieldbackground=colours.ground,
        background=colours.side,
        foreground=colours.text,
        arrowcolor=colours.weak,
        arrowsize=14,
        padding=(8, 6),
        borderwidth=1,
        lightcolor=colours.line,
        darkcolor=colours.line,
    )
    found.map("TCombobox", fieldbackground=[("readonly", colours.ground)], foreground=[("readonly", colours.text)])
    found.configure(
        "Horizontal.TProgressbar",  # invisible at 0
        background=colours.accent,
        troughcolor=colours.side,
        bordercolor=colours.side,
        lightcolor=colours.accent,
        darkcolor=colours.accent,
    )
    for option, value in (
        ("background", colours.ground),
        ("foreground", colours.text),
        ("selectBackground", colours.accent),
        ("selectForeground", colours.on_accent),
        ("font", fonts.text),
    ):
        window.option_add(f"*TCombobox*Listbox.{option}", value)
    # A scroll bar without arrows, and a list with space between its rows.
    thumb: list[Any] = [("Vertical.Scrollbar.thumb", {"expand": True, "sticky": "nswe"})]
    found.layout("Vertical.TScrollbar", [("Vertical.Scrollbar.trough", {"sticky": "ns", "children": thumb})])
    found.configure(
        "Vertical.TScrollbar",
        background=colours.line,
        troughcolor=colours.ground,
        bordercolor=colours.ground,
        lightcolor=colours.line,
        darkcolor=colours.line,
        gripcount=0,
        arrowsize=10,
    )
    found.map("Vertical.TScrollbar", background=[("disabled", colours.ground), ("active", colours.weak)])
    found.layout("Treeview", [("Treeview.treearea", {"sticky": "nswe"})])
    found.configure(
        "Treeview",
        background=colours.side,
        fieldbackground=colours.side,
        foreground=colours.text,
        rowheight=34,
        indent=0,
    )
    found.map("Treeview", background=[("selected", colours.chosen)], foreground=[("selected", colours.text)])
    found.layout("Treeview.Item", [("Treeitem.padding", {"sticky": "nswe", "children": [("Treeitem.text", {})]})])
    found.configure("Treeview.Item", padding=(10, 0))
