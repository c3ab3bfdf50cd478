"""What the names of drops and repairs mean, in a sentence that a person understands at once.

A name that is not listed here is shown as it is, with blanks: sources may add their own.
"""

_DROPS = {
    "annotation_missing": "No annotation belongs to the question",
    "annotation_without_question": "No question belongs to the annotation",
    "answer_count_differs": "Questions and answers differ in number",
    "answer_not_a_text": "The answer is no text",
    "answer_not_among_choices": "The answer is none of the choices",
    "answer_speaks_of_the_prompt": "The answer speaks of the text that its author was given, not "
    "of the picture",
    "box_empty": "A box has no width or no height",
    "box_missing": "The box that is meant is not in the file",
    "box_not_four_numbers": "A box is not four numbers",
    "box_outside_picture": "A box lies outside of its picture",
    "cell_count_differs": "The row has more or fewer cells than the header",
    "control_markers_nested": "Control markers stand inside each other without end",
    "conversation_with_several_images": "The rows of a conversation name different pictures",
    "coordinates_left_over": "Coordinates are left in the text",
    "duplicate": "The same words about the same picture are in already",
    "duplicate_id": "The id is taken already",
    "empty_answer": "No answer: nothing is left of its text",
    "empty_question": "No question: nothing is left of its text",
    "held_out_picture": "The picture belongs to a held-out set",
    "held_out_split": "The record belongs to a held-out split",
    "image_ambiguous": "The name fits several pictures",
    "image_broken": "The picture cannot be decoded",
    "image_empty_file": "The picture's file is empty",
    "image_id_differs": "Question and answer name different pictures",
    "image_missing": "The picture is not on this disk",
    "image_name_missing": "A picture is meant and none is named",
    "image_name_not_a_string": "The picture's name is no text",
    "image_not_an_image": "The file is no picture, whatever its name says",
    "image_not_readable": "The picture may not be read",
    "image_outside_root": "The picture's link leads out of the image root",
    "image_path_unsafe": "The picture's path is absolute or climbs out of the image root",
    "image_too_large": "The picture has too many pixels: a decompression bomb",
    "image_too_long": "The picture is a strip: too long for its width",
    "image_too_small": "The picture is too small to show anything",
    "image_truncated": "The picture's file ends before the picture does",
    "left_out_by_weight": "Left out by the source's weight",
    "line_malformed": "The line has not the form of the others",
    "near_duplicate": "The same words about a picture that looks the same are in already",
    "no_assistant_turn": "Nobody answers",
    "no_picture": "The record has no picture",
    "over_max": "Over the source's cap",
    "over_quota": "Over the source's quota",
    "part_of_llava_instruct": "LLaVA-Instruct's own record, which this file repeats",
    "question_not_a_text": "The question is no text",
    "question_without_annotation": "No annotation answers the question",
    "record_not_an_object": "The record is no JSON object",
    "roles_do_not_alternate": "Two questions or two answers follow each other",
    "several_images": "It shows several pictures, and CogVLM reads one",
    "spreadsheet_formula": "A cell is a formula, which a spreadsheet would run",
    "text_not_a_string": "A turn's text is no text",
    "text_not_unicode": "The text cannot be written as Unicode",
    "turn_not_an_object": "A turn is no JSON object",
    "turns_missing": "There are no turns",
    "unanswerable_over_share": "Unanswerable, beyond the share that is kept",
    "unknown_role": "Somebody speaks who is neither user nor assistant",
    "unknown_split": "The split's name is unknown, so it may be held out",
    "unknown_style": "The prompt style is unknown",
    "unrelated_caption": "The caption is listed as unrelated to its picture",
}
_REPAIRS = {
    "control_marker_removed": "control marker taken out of an answer",
    "empty_round_removed": "empty round taken out",
    "leading_answer_removed": "answer before the first question taken out",
    "marker_added": "picture marker added",
    "marker_moved_or_merged": "picture marker put in its place",
    "question_label_removed": "the prompt's own “Question:” taken out of an answer's line",
    "split_unknown": "entered though nothing says whether it is held out",
    "trailing_question_removed": "last question without an answer taken out",
}
_KINDS = {
    "cmyk": "CMYK",
    "deep_grey": "16-bit or float grey",
    "other_mode": "black and white, or another mode",
    "palette": "palette",
    "several_frames": "animated (first frame)",
    "transparent": "transparent parts",
    "turned_by_exif": "turned upright by EXIF",
    "wrong_extension": "wrong file extension",
}


def explain(reason: str) -> str:
    """A sentence for the reason of a drop."""
    return _DROPS.get(reason) or _plain(reason)


def explain_repair(name: str) -> str:
    """A phrase for a repair."""
    return _REPAIRS.get(name) or name.replace("_", " ")


def explain_kind(name: str) -> str:
    """A phrase for a kind of picture that is converted when it is read."""
    return _KINDS[name]


def _plain(name: str) -> str:
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]
