"""The interactive session of `ort_generate -i`: a text that you and the model write in turns."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable

from smallgpt.beams import beam_search
from smallgpt.cli import interrupts
from smallgpt.files import expand, write_atomic
from smallgpt.generation import Batch
from smallgpt.options import convert, unescape
from smallgpt.runtime import OrtGPT
from smallgpt.sampling import GenerationConfig

HELP = """Type a text and the model goes on from all that was written so far; an empty line lets it go on.
/set NAME VALUE   change a setting, such as /set temperature 0.5; /set alone shows them all
/seed N           draw with another seed
/regen            take the last continuation back and draw another one
/reset            begin an empty text
/save FILE        write the text so far
/stats            tokens and speed
/exit             leave; Ctrl-C stops a continuation, and leaves when none is running
"""


class Session:
    """One interactive session. What the user types is read by `input`, so the terminal's line editing works."""

    def __init__(
        self,
        model: OrtGPT,
        config: GenerationConfig,
        *,
        slide: bool = False,
        speculate: int = 0,
        escape: bool = False,
    ) -> None:
        self.model, self.config, self.slide, self.speculate, self.escape = model, config, slide, speculate, escape
        self.text = ""  # all that was written so far
        self.before = ""  # the same before the last continuation
        self.turn = 0  # the sequence number of the next continuation
        self.tokens, self.seconds = 0, 0.0
        self.commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self.say(HELP.rstrip()),
            "set": self.set,
            "seed": lambda value: self.set(f"seed {value}"),
            "regen": lambda _: self.go_on(self.before),
            "reset": lambda _: self.reset(),
            "save": self.save,
            "stats": lambda _: self.stats(),
        }

    def run(self) -> int:
        """Read and answer lines until the end of the input, /exit, or Ctrl-C at the prompt."""
        with contextlib.suppress(ImportError):  # line editing, where the system has it
            import readline  # noqa: F401
        self.say(f"{self.model.bundle.folder} | seed {self.config.seed} | /help lists the commands")
        while True:
            try:
                line = input("> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            except UnicodeDecodeError as error:
                self.say(f"error: {error}")
                continue
            command, _, value = line[1:].partition(" ")
            if command in ("exit", "quit") and line.startswith("/"):
                return 0
            try:
                if not line.startswith("/"):
                    self.go_on(self.text + (unescape(line) if self.escape else line))
                elif command in self.commands:
                    self.commands[command](value.strip())
                else:
                    self.say(f"unknown command /{command}; /help lists them")
            except (ValueError, OSError) as error:
                self.say(f"error: {error}")

    def say(self, text: str) -> None:
        print(text, file=sys.stderr)

    def go_on(self, text: str) -> None:
        """Continue a text and show the continuation; Ctrl-C ends it and keeps what is there."""
        tokenizer, limit = self.model.tokenizer, self.model.max_seq_len
        ids = [tokenizer.eos_id, *tokenizer.encode(text)]
        if len(ids) > limit and not self.slide:
            self.say(f"error: the text would have {len(ids)} tokens, the context {limit}; /reset begins an empty one")
            return
        self.before = self.text = text
        ids = ids[-(limit // 2) :] if len(ids) > limit else ids
        begun, finish = time.perf_counter(), ""
        try:
            finish = self.search(ids) if self.config.num_beams > 1 else self.sample(ids)
        except KeyboardInterrupt:
            pass
        except (ValueError, FloatingPointError) as error:
            self.say(f"error: {error}")
        self.turn += 1
        self.seconds += time.perf_counter() - begun
        print()
        if finish == "eos":
            self.say("(the text is complete; /reset begins another one)")

    def sample(self, ids: list[int]) -> str:
        """Show a sampled continuation; why it ended."""
        batch = Batch(self.model, 1, speculate=self.speculate, slide=self.slide)
        batch.add(0, ids, self.config, number=self.turn)
        finish = ""
        with interrupts() as pressed:
            while batch.busy and not pressed:
                for piece in batch.step():
                    self.tokens += piece.token is not None
                    finish = piece.finish or ""
                    self.show(piece.text)
            last = batch.cancel(0)
            self.show(last.text if last else "")  # what was held back
        return finish

    def search(self, ids: list[int]) -> str:
        """Show what beam search finds; why it ended."""
        for step in beam_search(self.model, ids, self.config):
            self.show(step.text)
        self.tokens += len(step.done[0].ids)
        return step.done[0].finish

    def show(self, text: str) -> None:
        self.text += text
        sys.stdout.write(text)
        sys.stdout.flush()

    def set(self, line: str) -> None:
        name, _, value = line.partition(" ")
        if not name:
            self.say("\n".join(f"{name} = {value}" for name, value in self.config.to_dict().items()))
            return
        name = {"temp": "temperature"}.get(name.replace("-", "_"), name.replace("-", "_"))
        self.config = dataclasses.replace(self.config, **{name: convert(name, value.strip())})
        if name == "seed":
            self.turn = 0
        self.say(f"{name} = {getattr(self.config, name)}")
        if name == "num_beams" and self.config.num_beams > 1 and (self.slide or self.speculate):
            self.say("beam search neither guesses ahead nor slides over the end of the context; num_beams 1 does again")

    def reset(self) -> None:
        self.text = self.before = ""
        self.turn = 0
        self.say("the text is empty")

    def save(self, value: str) -> None:
        if not value:
            raise ValueError("/save needs the name of a file")
        write_atomic(expand(value), self.text)
        self.say(f"{len(self.text.encode('utf-8'))} bytes in {value}")

    def stats(self) -> None:
        length = len(self.model.tokenizer.encode(self.text)) + 1
        rate = self.tokens / self.seconds if self.seconds else 0.0
        self.say(
            f"{length} of {self.model.max_seq_len} tokens in the context | {self.tokens} generated, {rate:.1f} tokens/s"
            f" | seed {self.config.seed}, turn {self.turn}"
        )
