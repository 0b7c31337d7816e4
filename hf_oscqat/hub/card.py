"""The model card of a packed checkpoint: rendered from what was measured, merged with what people have written.

Cards are pushed again and again, and people edit them on the Hub. A card therefore ends with a comment that holds a
digest of each part as it was generated: a part that no longer matches was edited by a person and is kept.
"""

import difflib
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined, UndefinedError

logger = logging.getLogger(__name__)

TEMPLATE = "model_card.md.jinja"
CARD, RESULTS, RECIPE, EVAL_RESULTS = "README.md", "results.json", "recipe.yaml", ".eval_results"
WEIGHTS = "model.safetensors"
TASK = "image-classification"
OURS = "hf_oscqat: "
"""What the notes of our entries in `.eval_results/` begin with."""
METRICS = {"accuracy": ("accuracy", "Top-1 accuracy"), "top_5_accuracy": ("top5_accuracy", "Top-5 accuracy")}
"""Metric in the card's metadata: (its name in `results.json`, the same for people)."""
FACTS = ("library_name", "pipeline_tag", "base_model", "base_model_relation")
"""Metadata that say what the files are; pushing other files makes others of them, whoever wrote the old ones."""
LICENSES = frozenset(
    """afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 lppl-1.3c mit mpl-2.0
    ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense
    wtfpl zlib""".split()
)
"""Identifiers that the Hub knows; any other licence is `other` with a `license_name`."""

LICENSE_KEYS = ("license", "license_name", "license_link")
"""Metadata that make sense together only."""

_MARKS = re.compile(r"\n*<!-- made by oscqat (\{.*\}) -->[ \t]*\n?")
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)(.*)\Z", re.DOTALL)
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})(.*)$")
_HEADING = re.compile(r"^##[ \t]+(.+?)[ \t]*$")


class CardError(ValueError):
    """A card cannot be read or made; the message says what to do."""


def template() -> Traversable:
    """Return the template: in an installed package inside it, in a checkout in the folder beside it."""
    installed = files("hf_oscqat") / "model_cards" / TEMPLATE
    return installed if installed.is_file() else Path(__file__).parents[2] / "model_cards" / TEMPLATE


def render_card(results: Mapping[str, Any]) -> str:
    """Render the card from what a run measured.

    Args:
        results: the content of `results.json`, as `integration/publish.py` collects it.

    Returns:
        The card, metadata included.

    Raises:
        CardError: if the licence is not known, or `results` lacks what the template asks for.
    """
    if not results["model"]["license"]:
        raise CardError(
            f"got no licence for {results['model']['name']}: {results['model']['origin']} states none. Expected that "
            "of the model, such as apache-2.0: pass --model_license to run_qat.py, or --license to oscqat"
        )
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False, keep_trailing_newline=True
    )
    environment.filters |= {"percent": _percent, "thousands": _thousands}
    accuracy = results["accuracy"]
    lost = recovered = None
    if all(accuracy.get(key) for key in ("float", "rounded", "packed")):
        top1 = {key: accuracy[key]["accuracy"] for key in ("float", "rounded", "packed")}
        if top1["rounded"] < min(top1["float"], top1["packed"]):
            lost, recovered = top1["float"] - top1["rounded"], top1["packed"] - top1["rounded"]
    body = environment.from_string(template().read_text(encoding="utf-8")).render(
        **results, lost=lost, recovered=recovered
    )
    metadata = _read_yaml(_metadata(results).to_yaml(), "the metadata of a new card")
    sections = _split(re.sub(r"\n{3,}", "\n\n", body))
    marks = _Marks(
        metadata={key: _digests(value) for key, value in metadata.items() if key != "model-index"},
        results=[_digest(entry) for entry in _entries(metadata)],
        sections={heading: _digest(text) for heading, text in sections.items()},
    )
    return str(_Card(metadata, sections, marks))


def update_card(theirs: str, ours: str, place: str = "the card that is there") -> str:
    """Put a card in the place of another one, and keep what people have written in that.

    - A section or an entry of the metadata that a person has edited or added stays as it is, and one that a person
      has removed stays away. Of lists such as tags, that holds for each item.
    - Where a person has edited ours too, as in the folder of the checkpoint, that is taken if the other was not edited
      since it was last written from here. Otherwise theirs stays, and the log says so.
    - Results of the same dataset and metric are replaced, others that people have added stay.

    Args:
        theirs: the card that is there, from `render_card` or from anywhere else.
        ours: a card from `render_card`, perhaps edited.
        place: where the first one is, for messages.

    Raises:
        CardError: if a front matter is no YAML, or holds results of another form.
    """
    old, new = _parse(theirs, place), _parse(ours, "the new card")
    metadata = _merge_metadata(old, new)
    kept, sections = _merge_sections(old, new)
    if kept:
        logger.warning(
            "kept of %s, because people have edited it: %s. Numbers in there may be those of earlier weights",
            place,
            ", ".join(kept),
        )
    written = {heading: _digest(text) for heading, text in sections.items()}
    generated = new.marks.sections
    marks = replace(new.marks, written={h: d for h, d in written.items() if generated.get(h, d) != d})
    return str(_Card(metadata, sections, marks))


def read_metadata(card: str, place: str) -> dict[str, Any]:
    """Return the metadata of a card.

    Args:
        card: its text.
        place: where it is, for messages.

    Raises:
        CardError: if they are no YAML mapping.
    """
    return _parse(card, place).metadata


def check_license(card: str, license: str | None, place: str) -> None:
    """Refuse a card that states another licence than was asked for, because a person has written it there.

    Args:
        card: its text.
        license: what was asked for, or None.
        place: where it is to stand, for messages.

    Raises:
        CardError: if it does.
    """
    if license is None:
        return
    metadata = read_metadata(card, place)
    stated, stated_name = metadata.get("license"), metadata.get("license_name")
    wanted, wanted_name = hub_license(license)
    same = license.lower() == str(stated).lower()  # also where the Hub knows it by now, and this package does not
    if not same and (wanted != str(stated).lower() or wanted_name not in (None, stated_name)):
        raise CardError(
            f"got licence {license!r} for {place}, whose card says {stated_name or stated!r}, as a person has "
            "written: change it there, or leave the licence out"
        )


def hub_license(license: str) -> tuple[str, str | None]:
    """How the Hub writes a licence: its identifier, and the name where that is `other`; see `LICENSES`."""
    identifier = license.lower()
    return (identifier, None) if identifier in LICENSES else ("other", license)


def has_edited_license(card: str, place: str) -> bool:
    """Whether a person has written the licence of a card, which will therefore be kept.

    Args:
        card: its text.
        place: where it stands, for messages.

    Raises:
        CardError: if its metadata are no YAML.
    """
    return _license_is_edited(_parse(card, place))


def read_card(path: Path) -> str:
    """Return the text of a card.

    Raises:
        CardError: if it is not in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise CardError(f"got {path}, which is not in UTF-8 ({error.reason}), expected that: save it so") from error


def with_results(card: str, values: Mapping[tuple[Any, ...], float], place: str) -> str:
    """Return a card with other values of results that it has.

    Args:
        card: its text.
        values: by task, dataset, configuration, split and metric.
        place: where it is, for messages.

    Raises:
        CardError: if its metadata are no YAML mapping.
    """
    parsed = _parse(card, place)
    for model in parsed.metadata.get("model-index") or []:
        for result in model.get("results") or []:
            for metric in result.get("metrics") or []:
                identity = _identity({**result, "metrics": [metric]})
                metric["value"] = values.get(identity, metric.get("value"))
    return str(parsed)


def eval_results_file(results: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return path and content of the file in `.eval_results/`, which the Hub shows beside its benchmarks.

    Args:
        results: the content of `results.json`.

    Returns:
        None where nothing was measured on a dataset of the Hub.
    """
    data, measured = results["data"], results["accuracy"]["packed"]
    if not measured or not data or not data["dataset_id"] or not data["evaluation"]:
        return None
    value, day = measured["accuracy"], results["run"]["date"] if results["run"] else None
    notes = f"{OURS}top-1 accuracy in percent, split {data['split']}, of {results['scheme']['name']}, simulated"
    return eval_results_entry(data["dataset_id"], data["config"], data["revision"], value, day, notes)


def eval_results_entry(
    dataset_id: str, config: str | None, revision: str | None, accuracy: float, day: str | None, notes: str
) -> tuple[str, str]:
    """Return path and content of a file in `.eval_results/` with one value.

    Args:
        dataset_id: of a dataset of the Hub.
        config: its configuration, which is taken for the task.
        revision: its commit.
        accuracy: top-1, in [0, 1].
        day: when it was measured.
        notes: how.
    """
    dataset = {"id": dataset_id, "task_id": config or "default"} | ({"revision": revision} if revision else {})
    entry = {"dataset": dataset, "value": round(100 * accuracy, 4)} | ({"date": day} if day else {}) | {"notes": notes}
    return f"{EVAL_RESULTS}/{dataset_id.replace('/', '--')}.yaml", yaml.safe_dump([entry], sort_keys=False)


def merge_eval_results(theirs: str, ours: str) -> str:
    """Put our entries into a file of `.eval_results/`, in place of all that are from here.

    Entries that people have made stay, also where they are about the same. One from here that has the same value
    stays as it is, with its date.

    Args:
        theirs: content of the file there; "" for none.
        ours: content of our file; "" takes away what was from here.

    Raises:
        CardError: if the file there is no list of entries.
    """
    entries, new = _read_entries(theirs), _read_entries(ours)
    if not new and not any(_is_ours(entry) for entry in entries):
        return theirs
    kept = [entry for entry in entries if not _is_ours(entry)]
    for entry in new:
        same = [old for old in entries if _is_ours(old) and _about(old) == _about(entry)]
        kept.append(same[0] if same and same[0].get("value") == entry["value"] else entry)
    if kept == entries:
        return theirs
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True) if kept else ""


def _read_entries(text: str) -> list[dict[str, Any]]:
    try:
        entries = yaml.safe_load(text) or []
    except yaml.YAMLError as error:
        raise CardError(f"got a file of {EVAL_RESULTS} that is no YAML ({error}); mend or remove it") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CardError(f"got a file of {EVAL_RESULTS} that is no list of entries; mend or remove it")
    return entries


def _is_ours(entry: Mapping[str, Any]) -> bool:
    return str(entry.get("notes", "")).startswith(OURS)


def _about(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    dataset = entry.get("dataset")
    dataset = dataset if isinstance(dataset, Mapping) else {}
    return dataset.get("id"), dataset.get("task_id"), dataset.get("revision")


def card_of(folder: Path, *, license: str | None = None, repo_id: str | None = None) -> str:
    """Return the card of a folder with a packed checkpoint: rendered anew, with what people have edited.

    Args:
        folder: with `results.json`, or at least a card.
        license: of the model, instead of what `results.json` states.
        repo_id: repository that the card is to stand in; None leaves the folder's name.

    Raises:
        ValueError: if there is neither, no licence, or one of the two cannot be read.
    """
    here = folder / CARD
    results = read_results(folder) if (folder / "config.json").is_file() else None
    if results is None:
        if not here.is_file():
            inside = (folder / "packed" / RESULTS).is_file()
            hint = f"; you may mean {folder / 'packed'}" if inside else ""
            raise CardError(
                f"got {folder} without {CARD} and {RESULTS}, expected a packed checkpoint with its card, as "
                f"run_qat.py writes it{hint}. After training of your own, trainer.push_to_hub(license=..) makes one, "
                "and so does model.push_to_hub(.., license=..)"
            )
        text = read_card(here)
        if not read_metadata(text, str(here)).get("license"):
            raise CardError(f"got {here} without a licence, expected `license: ..` among its metadata")
        return text
    weights, measured = folder / WEIGHTS, results.get("weights_sha256")
    if measured and weights.is_file() and hashlib.sha256(weights.read_bytes()).hexdigest() != measured:
        raise CardError(
            f"got {weights}, which are not the weights that {RESULTS} beside them is about: remove {RESULTS} and "
            f"{CARD} and push the model with model.push_to_hub(.., license=..), or run the training again"
        )
    if repo_id is not None:
        results["model"] |= {"name": repo_id.rpartition("/")[2], "path": repo_id}
    results["model"].setdefault("license_inherited", False)  # not said by the first version
    if license is not None:
        results["model"] |= {"license": license, "license_inherited": False}
    try:
        text = render_card(results)
    except (UndefinedError, KeyError, TypeError) as error:
        raise CardError(
            f"got {folder / RESULTS}, from which no card can be made ({error}), expected what run_qat.py of this "
            "version wrote"
        ) from error
    return update_card(read_card(here), text, str(here)) if here.is_file() else text


def write_card(folder: Path, license: str | None = None) -> Path:
    """Render the card of a folder anew.

    Args:
        folder: see `card_of`.
        license: see `card_of`.

    Returns:
        Where it is.

    Raises:
        ValueError: see `card_of`.
    """
    text = card_of(folder, license=license)
    (folder / CARD).write_text(text, encoding="utf-8")
    return folder / CARD


def read_results(folder: Path) -> dict[str, Any] | None:
    """Read `results.json` of a packed checkpoint; None if there is none.

    Raises:
        CardError: if it is no JSON object of that kind.
    """
    path = folder / RESULTS
    if not path.is_file():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CardError(f"got {path}, which is no JSON ({error}), expected what run_qat.py wrote") from error
    if not isinstance(results, dict) or not isinstance(results.get("model"), dict):
        raise CardError(f"got {path} without a model, expected what run_qat.py wrote")
    return results


@dataclass
class _Marks:
    """Digests of what was generated; empty for a card that was not.

    Attributes:
        metadata: of each value by key, item by item for a list.
        results: of each result and metric.
        sections: by heading.
        written: by heading, of what was written in place of what was generated, because a person had edited it.
    """

    metadata: dict[str, list[str]] = field(default_factory=dict)
    results: list[str] = field(default_factory=list)
    sections: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)


@dataclass
class _Card:
    """Front matter, sections by heading in their order (the first, before any heading, is ""), and the marks."""

    metadata: dict[str, Any]
    sections: dict[str, str]
    marks: _Marks

    def __str__(self) -> str:
        front = yaml.safe_dump(self.metadata, sort_keys=False, allow_unicode=True)
        body = "\n\n".join(text for text in self.sections.values() if text)
        marks = f"\n<!-- made by oscqat {json.dumps(vars(self.marks), separators=(',', ':'))} -->\n"
        return f"---\n{front}---\n\n{body}\n{marks if self.marks != _Marks() else ''}"

    def edited(self, heading: str) -> bool:
        """Whether a person has written a section, or changed what was generated."""
        return self.marks.sections.get(heading) != _digest(self.sections[heading])


def _parse(text: str, place: str) -> _Card:
    match = _FRONT_MATTER.match(text)
    front, body = match.groups() if match else ("", text)
    metadata = _read_yaml(front, place)
    body = body.replace("\r\n", "\n")
    marks = _Marks()
    # People write behind the comment too; what stands there belongs to the last section, or begins a new one.
    for found in _MARKS.finditer(body):
        try:
            marks = _Marks(**json.loads(found[1]))
        except (ValueError, TypeError):
            logger.warning("the comment of oscqat at the end of %s was changed: all of it is taken for edited", place)
    _entries(metadata, place)
    return _Card(metadata, _split(_MARKS.sub("\n", body)), marks)


def _read_yaml(text: str, place: str) -> dict[str, Any]:
    try:
        metadata = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise CardError(
            f"got metadata of {place} that are no YAML ({where}), expected key: value between two lines of ---. Mend "
            "or remove them, then do this again; nothing was changed"
        ) from error
    if metadata is not None and not isinstance(metadata, dict):
        raise CardError(f"got metadata of {place} that are a {type(metadata).__name__}, expected key: value")
    return metadata or {}


def _split(body: str) -> dict[str, str]:
    sections: dict[str, list[str]] = {"": []}
    heading, fence = "", ""
    for line in body.strip("\n").split("\n"):
        marker = _FENCE.match(line)
        if fence:
            # Closed by as many of the same or more, with nothing behind them.
            if marker and marker[1].startswith(fence) and not marker[2].strip():
                fence = ""
        elif marker and not (marker[1][0] == "`" and "`" in marker[2]):
            fence = marker[1]
        found = None if fence else _HEADING.match(line)
        if found:
            heading = found[1]
            while heading in sections:  # a heading may stand twice
                heading += " "
            sections[heading] = []
        sections[heading].append(line.rstrip())
    return {heading: "\n".join(lines).strip("\n") for heading, lines in sections.items()}


def _merge_sections(old: _Card, new: _Card) -> tuple[list[str], dict[str, str]]:
    """Return the headings kept of the old card, and the sections of both."""
    kept: list[str] = []
    merged: dict[str, str] = {}
    for heading, text in new.sections.items():
        if heading not in old.sections:
            if heading not in old.marks.sections or new.edited(heading):
                merged[heading] = text
        elif old.edited(heading) and old.sections[heading] and not _is_newer(heading, old, new):
            merged[heading] = old.sections[heading]
            if merged[heading] != text:
                kept.append(heading or "the introduction")
        else:
            merged[heading] = text
    previous = ""
    for heading, text in old.sections.items():
        added = heading not in old.marks.sections or old.edited(heading)
        if heading not in merged and heading not in new.sections and text and added:
            # Where it stood: behind the section that it followed.
            before = list(merged.items())
            at = 1 + next((i for i, (name, _) in enumerate(before) if name == previous), len(before) - 1)
            merged = dict([*before[:at], (heading, text), *before[at:]])
            kept.append(heading)
        previous = heading
    return kept, merged


def _is_newer(heading: str, old: _Card, new: _Card) -> bool:
    """Whether a person has edited ours, and nobody theirs since it was written from here."""
    untouched = old.marks.written.get(heading, old.marks.sections.get(heading)) == _digest(old.sections[heading])
    return new.edited(heading) and untouched


def _license_is_edited(card: _Card) -> bool:
    before = card.marks.metadata
    return any(key in card.metadata and before.get(key) != _digests(card.metadata[key]) for key in LICENSE_KEYS)


def _merge_metadata(old: _Card, new: _Card) -> dict[str, Any]:
    merged = dict(new.metadata)
    before = old.marks.metadata
    for key in {**old.metadata, **before}:
        theirs, ours = old.metadata.get(key), merged.get(key)
        if key in ("model-index", *FACTS, *LICENSE_KEYS) or before.get(key) == _digests(theirs):
            continue
        if isinstance(theirs, list) and isinstance(ours, list):
            there = [_digest(item) for item in theirs]
            removed = set(before.get(key, ())) - set(there)
            merged[key] = [item for item in ours if _digest(item) not in removed]
            generated = {*before.get(key, ()), *map(_digest, ours)}
            merged[key] += [item for item, digest in zip(theirs, there, strict=True) if digest not in generated]
        elif key not in old.metadata:  # a person has removed it
            merged.pop(key, None)
        else:
            if key in merged and ours != theirs and new.marks.metadata.get(key) != _digests(ours):
                logger.warning("kept %s: %r, which people have written, and not %r", key, theirs, ours)
            merged[key] = theirs
    if _license_is_edited(old):
        for key in LICENSE_KEYS:
            merged.pop(key, None)
            if key in old.metadata:
                merged[key] = old.metadata[key]
    replaced = {_identity(entry) for entry in _entries(new.metadata)}
    kept = [
        entry
        for entry in _entries(old.metadata)
        if _identity(entry) not in replaced and _digest(entry) not in old.marks.results
    ]
    if kept:
        index = merged.get("model-index") or [{"name": old.metadata["model-index"][0].get("name"), "results": []}]
        merged["model-index"] = [{**index[0], "results": [*index[0]["results"], *kept]}]
    return merged


def _entries(metadata: Mapping[str, Any], place: str = "a card") -> list[dict[str, Any]]:
    """Return the results of a card, one for each metric.

    Raises:
        CardError: if they have another form than the Hub's.
    """
    found: list[dict[str, Any]] = []
    try:
        for model in metadata.get("model-index") or []:
            for result in model.get("results") or []:
                found += [{**result, "metrics": [metric]} for metric in result.get("metrics") or []]
        for entry in found:
            _identity(entry)
    except (AttributeError, TypeError) as error:
        raise CardError(
            f"got a model-index in the metadata of {place} that cannot be read ({error}), expected a list of models "
            "with results, each with task, dataset and metrics. Mend or remove it, then do this again"
        ) from error
    return found


def _identity(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a result is about; the revision of the dataset is left out, because a newer result replaces an older."""
    dataset = entry.get("dataset") or {}
    metric = entry["metrics"][0]
    task = (entry.get("task") or {}).get("type")
    return task, dataset.get("type"), dataset.get("config"), dataset.get("split"), metric.get("type")


def _digests(value: Any) -> list[str]:
    return [_digest(item) for item in value] if isinstance(value, list) else [_digest(value)]


def _digest(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _metadata(results: Mapping[str, Any]) -> ModelCardData:
    model, data, measured = results["model"], results["data"], results["accuracy"]["packed"]
    license, license_name = hub_license(model["license"])
    if license_name is not None:
        close = difflib.get_close_matches(model["license"].lower().replace(" ", "-"), LICENSES, n=1)
        logger.warning(
            "the Hub does not know the licence %r; it will be called 'other'%s",
            model["license"],
            f". Did you mean {close[0]!r}?" if close else "",
        )
    card = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASK,
        license=license,
        license_name=license_name,
        base_model=model["base_model"],
        base_model_relation="quantized" if model["base_model"] else None,
        datasets=[data["dataset_id"]] if data and data["dataset_id"] else None,
        metrics=["accuracy"],
        tags=["timm", "oscqat", "quantization-aware-training", results["scheme"]["name"].lower()],
    )
    if data and data["evaluation"] and measured:
        card.model_name = model["name"]
        card.eval_results = [
            EvalResult(
                task_type=TASK,
                dataset_type=data["dataset_id"] or data["name"],
                dataset_name=data["name"],
                dataset_config=data["config"],
                dataset_split=data["split"],
                dataset_revision=data["revision"],
                dataset_args={**data["evaluation"], "num_images": measured["num_images"]},
                metric_type=kind,
                metric_name=title,
                metric_value=measured[key],
            )
            for kind, (key, title) in METRICS.items()
        ]
    return card


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _thousands(count: int) -> str:
    return f"{int(count):,}"
