"""The widgets of the window and their layout. `window.py` implements the actions."""

from __future__ import annotations

import tkinter as tk
from abc import ABC, abstractmethod
from collections.abc import Sequence
from tkinter import ttk
from typing import Any

from look import DARK, LIGHT, Fonts, style
from transcript import Transcript


class Layout(ABC):
    """The widgets. A subclass implements the user's actions."""

    def __init__(self, root: tk.Tk, models: Sequence[str], dark: bool) -> None:
        """models: names for the chooser."""
        self.root, self._dark = root, dark
        self._fonts = Fonts(root)
        root.title("edgelm desktop")
        root.geometry("1000x680")
        root.minsize(640, 420)
        root.protocol("WM_DELETE_WINDOW", self.close)
        self._build(models)
        self._paint()

    @abstractmethod
    def open_model(self, name: str) -> None: ...

    @abstractmethod
    def send(self) -> None: ...

    @abstractmethod
    def go_on(self) -> None: ...

    @abstractmethod
    def new(self) -> None: ...

    @abstractmethod
    def delete(self) -> None: ...

    @abstractmethod
    def turn_light(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _open_folder(self) -> None: ...

    @abstractmethod
    def _choose_conversation(self) -> None: ...

    @abstractmethod
    def _return(self, event: tk.Event[Any]) -> str | None: ...

    def _build(self, models: Sequence[str]) -> None:
        self.root.columnconfigure(2, weight=1)
        self.root.rowconfigure(0, weight=1)
        side = ttk.Frame(self.root, padding=12, width=240)
        side.grid(row=0, column=0, sticky="ns")
        ttk.Frame(self.root, style="Line.TFrame", width=1).grid(row=0, column=1, sticky="ns")
        self._build_side(side)
        main = ttk.Frame(self.root)
        main.grid(row=0, column=2, sticky="nsew")
        main.columnconfigure(0, weight=1)
        main.rowconfigure(2, weight=1)
        self._build_head(main, models)
        ttk.Frame(main, style="Line.TFrame", height=1).grid(row=1, sticky="ew")
        self._transcript = Transcript(main, self._fonts)
        self._transcript.grid(row=2, sticky="nsew")
        ttk.Frame(main, style="Line.TFrame", height=1).grid(row=3, sticky="ew")
        self._build_foot(main)

    def _build_side(self, side: ttk.Frame) -> None:
        side.rowconfigure(1, weight=1)
        ttk.Button(side, text="+  New conversation", style="Main.TButton", command=self.new).grid(sticky="ew")
        self._list = ttk.Treeview(side, show="tree", selectmode="browse")
        self._list.column("#0", width=230)
        self._list.grid(row=1, sticky="nsew", pady=12)
        self._list.bind("<<TreeviewSelect>>", lambda _: self._choose_conversation())
        self._list.bind("<Delete>", lambda _: self.delete())
        row = ttk.Frame(side)
        row.grid(row=2, sticky="ew")
        row.columnconfigure(0, weight=1)
        ttk.Button(row, text="Delete", command=self.delete).grid(row=0, column=0, sticky="w")
        ttk.Button(row, text="Light / dark", command=self.turn_light).grid(row=0, column=1, sticky="e")

    def _build_head(self, main: ttk.Frame, models: Sequence[str]) -> None:
        head = ttk.Frame(main, padding=(16, 12))
        head.grid(row=0, sticky="ew")
        head.columnconfigure(3, weight=1)
        ttk.Label(head, text="Model", style="Bold.TLabel").grid(row=0, column=0, padx=(0, 10))
        self._chooser = ttk.Combobox(head, state="readonly", width=24, font=self._fonts.text)
        self._chooser.configure(values=list(models))
        self._chooser.grid(row=0, column=1)
        self._chooser.bind("<<ComboboxSelected>>", lambda _: self.open_model(self._chooser.get()))
        ttk.Button(head, text="Open folder ...", command=self._open_folder).grid(row=0, column=2, padx=8)
        self._memory = ttk.Label(head, style="Small.TLabel", anchor="e")
        self._memory.grid(row=0, column=3, sticky="e")

    def _build_foot(self, main: ttk.Frame) -> None:
        foot = ttk.Frame(main, padding=(16, 12))
        foot.grid(row=4, sticky="ew")
        foot.columnconfigure(0, weight=1)
        self._input = tk.Text(foot, height=3, wrap="word", bd=0, padx=12, pady=9, highlightthickness=1, undo=True)
        self._input.configure(font=self._fonts.text)
        self._input.grid(row=0, column=0, rowspan=2, sticky="ew")
        self._input.bind("<Return>", self._return)
        self._button = ttk.Button(foot, text="Send", style="Main.TButton", width=10, command=self.send)
        self._button.grid(row=0, column=1, padx=(12, 0), sticky="ew")
        self._continue = ttk.Button(foot, text="Continue", width=10, command=self.go_on)
        self._continue.grid(row=1, column=1, padx=(12, 0), pady=(6, 0), sticky="ew")
        self._bar = ttk.Progressbar(foot, mode="determinate", maximum=1.0)
        self._bar.grid(row=2, column=0, columnspan=2, sticky="ew", pady=(10, 4))
        self._status = ttk.Label(foot, style="Small.TLabel")
        self._status.grid(row=3, column=0, columnspan=2, sticky="ew")

    def _paint(self) -> None:
        colours = DARK if self._dark else LIGHT
        self.root.configure(background=colours.side)
        style(self.root, colours, self._fonts)
        self._transcript.paint(colours)
        self._input.configure(
            background=colours.ground,
            foreground=colours.text,
            insertbackground=colours.text,
            highlightbackground=colours.line,
            highlightcolor=colours.accent,
        )
