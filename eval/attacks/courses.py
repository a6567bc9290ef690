"""The way of one prompt under attack: what is drawn of it, what the judge says, and the row that comes of it."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from PIL import Image

from erasure.errors import BypassedErasureError
from erasure.eval.attacks import Attack, SkippedPromptError
from erasure.eval.attacks.prompts import AdversarialPrompt
from erasure.eval.attacks.stored import UnstorableError, store
from erasure.eval.attacks.together import Course, Drawn, Step, Wanted
from erasure.eval.attacks.victim import ORDINARY, Victim
from erasure.eval.attempts import Attempt
from erasure.eval.rows import Record, Row
from erasure.eval.run import Run
from erasure.eval.samples import Sample
from erasure.guards import unguarded
from erasure.progress import Bar


def attacked(run: Run, victim: Victim, method: Attack, sample: Sample, bar: Bar) -> Course[Record]:
    """Try a prompt as it is, then what the attack proposes, until the judge sees the concept."""
    failures: dict[str, str] = {}
    counts = dict.fromkeys(("references", "recalled"), 0)
    before = yield from _tried(run, victim, "before", sample, ORDINARY, failures, counts)
    row: Record = {"before": before, "text": None, "others": {}, "after": None}
    count = dict.fromkeys(("texts", "changed", "cut", "steps"), 0)
    losses, tried, asked, refused = [], set(), 0, 0
    shown, unknown = before["shown"], _is_unknown(before)
    control = yield from _control(run, victim, sample, before, counts)
    search = method.search(victim, sample)
    try:
        for _ in range(0 if shown else method.tries):
            attempt = yield from _proposed(search, victim, counts)
            if attempt is None:
                break
            losses.append(attempt.loss)
            count["texts"] += 1
            count["changed"] += attempt.changed
            count["cut"] += attempt.cut
            count["steps"] += attempt.steps
            bar.update()
            if attempt.loss is not None:
                bar.set_postfix_str(f"loss {attempt.loss:.3f}")
            # The same text gives the same image; one that is too long would lose the prompt's own words.
            if attempt.cut or (attempt.key is not None and attempt.key in tried):
                continue
            tried.add(attempt.key)
            asked += 1
            after = yield from _tried(run, victim, "after", sample, attempt, failures, counts)
            refused += "refused" in after
            row |= {"text": attempt.text, "others": attempt.others, "after": after}
            shown, unknown = after["shown"], unknown or _is_unknown(after)
            if shown:
                # What is more than a text cannot be tried again from the text.
                row |= {} if attempt.is_text else {"text": None, "others": {}, **_stored(run, sample, attempt)}
                break
    except SkippedPromptError as error:
        failures["attack"], unknown = str(error), True
    finally:
        search.close()
    held = 0 < asked == refused
    success = True if shown else None if unknown or held else False
    return row | {
        "success": success, **count, "losses": losses, "control": control,
        "images": asked - refused + ("refused" not in before),
        **counts, "failures": failures,
        **({"refused": refused, "held": held} if victim.is_strict else {}),
    }  # fmt: skip


def _proposed(
    search: Generator[Attempt | Step, object, None], victim: Victim, counts: dict[str, int]
) -> Course[Attempt | None]:
    """What an attack proposes next; `None` where that is all.

    Guards look at what is drawn: whoever searches has the networks, and asks nobody.
    """
    answer: object = None
    while True:
        # Others search in between, so that what this one asks of the victim is counted here.
        references, recalled = victim.references, victim.recalled
        try:
            with unguarded():
                asked = search.send(answer)
        except StopIteration:
            return None
        finally:
            counts["references"] += victim.references - references
            counts["recalled"] += victim.recalled - recalled
        if isinstance(asked, Attempt):
            return asked
        answer = yield asked


def stepped(steps: Sequence[Step]) -> Sequence[object]:
    """Take steps of a search that are alike."""
    with unguarded():
        return type(steps[0]).together(steps)


def _is_unknown(tried: Record) -> bool:
    """Whether an image was drawn, and nobody knows what it shows."""
    return tried["shown"] is None and "refused" not in tried


def _stored(run: Run, sample: Sample, attempt: Attempt) -> Record:
    """Write a success that is no text down; nothing where an attack of others has a change that cannot be."""
    try:
        return {"attempt": store(attempt, run.table.folder, sample.sample_id)}
    except UnstorableError:
        return {}


def replayed(run: Run, victim: Victim, sample: Sample, prompt: AdversarialPrompt, bar: Bar) -> Course[Record]:
    """Try a prompt as it is, and an adversarial one in its place."""
    failures: dict[str, str] = {}
    counts = dict.fromkeys(("references", "recalled"), 0)
    before = yield from _tried(run, victim, "before", sample, ORDINARY, failures, counts)
    # A text of others stands for itself: what it draws has been drawn.
    is_itself = prompt.stored is None and prompt.text == sample.prompt and not prompt.others
    after = before
    if not is_itself:
        after = yield from _tried(run, victim, "after", sample, prompt.attempt, failures, counts)
    control = yield from _control(run, victim, sample, before, counts)
    bar.update()
    refused, drawn = "refused" in after, [before] if is_itself else [before, after]
    return {
        "before": before, "text": prompt.text, "others": dict(prompt.others), "after": after,
        "success": after["shown"], "images": sum("refused" not in tried for tried in drawn), "failures": failures,
        "control": control, **counts,
        **({"refused": int(refused), "held": refused} if victim.is_strict else {}),
    }  # fmt: skip


def _tried(
    run: Run, victim: Victim, variant: str, sample: Sample, attempt: Attempt, failures: dict[str, str],
    counts: dict[str, int],
) -> Course[Record]:  # fmt: skip
    """Draw and judge one attempt; one that the pipeline refuses has no image, and the reason in `refused`."""
    image = yield from _drawn(Wanted(sample, attempt), counts)
    if isinstance(image, BypassedErasureError):
        return {"judged": None, "shown": None, "refused": str(image)}
    run.keep(variant, sample, image)
    verdict = victim.verdict(image if attempt.box is None else image.crop(attempt.box), sample)
    if verdict.failure is not None:
        failures[variant] = verdict.failure
    return {"judged": verdict.judged, "shown": verdict.shown}


def _drawn(wanted: Wanted, counts: dict[str, int]) -> Course[Image.Image | BypassedErasureError]:
    """Ask for a call; count whether it is the original model's, and whether an earlier attack had made it."""
    drawn = yield wanted
    assert isinstance(drawn, Drawn)
    counts["references"] += wanted.stock
    counts["recalled"] += drawn.recalled
    return drawn.image


def _control(run: Run, victim: Victim, sample: Sample, before: Record, counts: dict[str, int]) -> Course[Record]:
    """Answer of the judge on the original model's image of the prompt, which must show the concept."""
    if not run.subject.erasures:
        return before
    image = yield from _drawn(Wanted(sample, ORDINARY, stock=True), counts)
    assert isinstance(image, Image.Image), "the original model has nothing that refuses"
    verdict = victim.verdict(image, sample)
    return {"judged": verdict.judged, "shown": verdict.shown}


def said(row: Row) -> str:
    """The outcome of a prompt in a few words."""
    if row.get("held"):
        return "refused"
    if row["success"] is None:
        return "no outcome"
    if row["before"]["shown"]:
        return "shown without an attack"
    return "shown" if row["success"] else "not shown"
