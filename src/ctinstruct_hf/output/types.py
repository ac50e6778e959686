"""Names of what results can be written as, and the notice that goes with them; imports nothing, since the command line's help needs them."""

NOTICE = "Research use only. Not a diagnosis."  # where results are shown
# in the order of writing: DICOM SR and FHIR refer to the masks' files
OUTPUT_TYPES = ("nifti", "nrrd", "dicom-seg", "dicom-seg-labelmap", "rtstruct", "dicom-sr", "fhir")
WITHOUT_MASKS = ("dicom-sr", "fhir")  # written where there is only text or a probability, too


def output_type(name: str) -> str:
    """`dicom_seg` and `DICOM-SEG` mean `dicom-seg`."""
    return name.strip().lower().replace("_", "-")


__all__ = ["NOTICE", "OUTPUT_TYPES", "WITHOUT_MASKS", "output_type"]
