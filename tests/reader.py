"""A judge that can read: it answers what the questions ask, by looking for the label."""


class Reader:
    """Labels by the marked token, and grades by whether the label is there.

    Args:
        grade: Of a text that has it; where texts are marked, it must be the marked token.
    """

    name = earlier_name = "reader"

    def __init__(self, grade: int = 1):
        self.grade = grade

    def ask(self, prompts, max_tokens):
        for place, prompt in enumerate(prompts):
            head, *texts = prompt.split("Text ")
            if "in one phrase" in head:
                yield place, texts[0].split("<<")[1].split(">>")[0].strip()
                continue
            label = head.split("described as: ")[1].split("\n")[0]
            wanted = f"<< {label}>>" if "marked by" in texts[-1] else f" {label} "
            yield place, str([self.grade * (wanted in text) for text in texts])
