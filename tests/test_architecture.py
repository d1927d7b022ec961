"""What ARCHITECTURE.md says of the tree is true: its excerpt, its memory map, its budgets, and what core and io know."""

import inspect
import re
import runpy
from pathlib import Path

import handgrad as hg
from handgrad.models import gpt2

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "handgrad"
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def sources(folder, *endings):
    return [p for p in sorted((PACKAGE / folder).rglob("*")) if p.suffix in endings and not p.name.startswith("test_")]


def lines_with(pattern, paths):
    """`file:line: text` of every line that a pattern matches."""
    return [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_excerpt_is_of_a_golden_listing():
    golden = (ROOT / "tests" / "golden" / "train_act.txt").read_text(encoding="utf-8").splitlines()
    excerpt = [line for line in PAGE.splitlines() if re.match(r"(fwd|bwd|upd)  ", line)]
    assert len(excerpt) == 3 and all(line in golden for line in excerpt)


def test_memory_map_is_the_plan():
    run = dict(execution=hg.Execution(micro_batch=16), precision=hg.Precision("bf16"), remedies=False)
    region = hg.explain(gpt2("124m"), 1024, **run).plan.region
    found = dict(re.findall(r"(params|state|grads|scratch|io) +([\d.]+) MiB", PAGE))
    sizes = {"scratch" if name == "activations" else name: size / 2**20 for name, (_, size) in region.items()}
    assert {name: float(size) for name, size in found.items()} == {
        name: round(size, 1 if size < 1 else None) for name, size in sizes.items()
    }


def test_budgets_on_the_page_are_those_that_are_tested():
    rows = dict(re.findall(r"^\| ([a-z ]+?) \| ([\d,]+) \|", PAGE, re.M))
    budgets = {name.replace(" and ", " "): int(count.replace(",", "")) for name, count in rows.items()}
    tested = runpy.run_path(str(ROOT / "tests" / "test_budget.py"))
    wanted = tested["BUDGETS"] | {"a model file": tested["MODEL"]}
    assert budgets == wanted


def test_core_names_no_op_optimizer_model_or_vendor():
    pattern = r'"(linear|add_norm|norm|attention|adamw)"|H100|[Hh]opper|cudnn|cublas|nvidia|wte|AdamW|GPT'
    found = lines_with(pattern, sources("core", ".py"))
    assert found == []


def test_io_names_gpt2_in_llmc_alone():
    found = lines_with(r"wte|c_attn|GPT2\b", sources("io", ".py"))
    assert found and {line.split(":")[0] for line in found} == {"io/llmc.py"}


def test_micro_step_is_a_counter_of_dropout_alone():
    """Kernels are told whether to accumulate; none concludes it from micro_step."""
    found = lines_with(
        r"->micro_step", sources("ops", ".c", ".h", ".cu", ".cuh") + sources("backends", ".c", ".h", ".cuh")
    )
    assert found and {line.split(":")[0] for line in found} == {
        "backends/cpu/include/philox.h",
        "backends/cuda/include/kernel.cuh",
    }
    readers = lines_with(r"scalars\.micro_step|k\.micro_step", sources("ops", ".py"))
    assert {line.split("/")[1] for line in readers} == {"attention", "dropout"}


def test_models_test_no_mode():
    assert lines_with(r"\.mode\b|mode ==", sources("models", ".py")) == []


def test_trainer_and_its_kind_take_few_parameters():
    assert len(inspect.signature(hg.Trainer).parameters) <= 8
    assert len(inspect.signature(hg.explain).parameters) <= 8


def test_files_on_the_page_exist():
    named = re.findall(r"\b((?:core|train|models|io|backends|ops)/\w[\w/]*\.(?:py|cuh|cu))\b", PAGE)
    assert len(named) > 10
    assert [file for file in named if not (PACKAGE / file).exists()] == []
