"""A teacher of a job with `plan: served`: looked at before anything long begins."""

from modxfer_fast.config import ConfigError, JobConfig, ServerSection
from modxfer_fast.config.model import TeacherModelSection
from modxfer_fast.engine import DistillConfig, ServedTeacher
from modxfer_fast.jobs.distill.material import Material
from modxfer_fast.jobs.ranks import on_main
from modxfer_fast.models import load_model_config
from modxfer_fast.serving import FORMATS, ListedAnswers, open_server

# what tokenizers cut differently: case, code, digits, accents, other scripts, white space
_PROBE = "def Area(r):  return 3.14159 * r**2\n\tNaïve Größe, 東京, Привет: 1,024 tokens' worth."


def check_waits(config: JobConfig) -> None:
    """Raise a ConfigError where training would end, as one that hangs, before a request that gets
    no answer has failed and said whose."""
    stall_s = config.training.get("stall_timeout_s", DistillConfig.stall_timeout_s)
    sections: dict[str, ServerSection | None] = {
        f"{role}.served": section.served if section.plan == "served" else None
        for role, section in config.teacher_sections.items()
    }
    if config.on_policy is not None:
        sections["on_policy.vllm"] = config.on_policy.vllm
    for where, section in sections.items():
        if section is not None and stall_s is not None:
            longest = section.timeout_s + section.retry_s
            if longest >= stall_s:
                raise ConfigError(
                    f"{where}: expected timeout_s and retry_s of less than {stall_s:g} s together, "
                    f"training.stall_timeout_s, got {longest:g} s"
                )


def open_served(config: JobConfig, material: Material, role: str = "teacher") -> ServedTeacher:
    """The teacher, whose server was asked what it serves, how it cuts a text, and for an answer.

    Raises:
        ConfigError: no key in the variable that is to hold it.
        ServerError: it cannot be reached, or cannot teach this job.
    """
    tokenizer = material.tokenizer
    teacher = served_teacher(config.teacher_sections[role], len(tokenizer), role)
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    last, longest = len(tokenizer) - 1, config.data.max_length
    if config.on_policy is not None:
        longest = max(longest, config.on_policy.max_length or 0)
    on_main(lambda: teacher.source.check(_PROBE, ids, last, longest))
    return teacher


def served_teacher(
    one: TeacherModelSection, num_tokens: int, role: str = "teacher"
) -> ServedTeacher:
    """The teacher, whose server was not asked yet.

    Raises:
        ConfigError: no key in the variable that is to hold it.
    """
    section = one.served
    assert section is not None
    assert one.path is not None  # the section has seen to it
    server = open_server(section, f"{role}.served")
    teacher_config = load_model_config(one.path, one)
    source = ListedAnswers(
        server,
        FORMATS[section.api],
        section.model,
        classes=teacher_config.get_text_config().vocab_size,
        top_k=section.top_k,
        request_tokens=section.request_tokens,
    )
    teacher = ServedTeacher(source, section.tail)
    teacher.num_tokens = num_tokens
    return teacher
