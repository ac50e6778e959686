"""Names of what results can be written as; imports nothing, since the command line's help needs them."""

# in the order of writing: DICOM SR and FHIR refer to the masks' files
OUTPUT_TYPES = ("nifti", "nrrd", "dicom-seg", "rtstruct")


def output_type(name: str) -> str:
    """`dicom_seg` and `DICOM-SEG` mean `dicom-seg`."""
    return name.strip().lower().replace("_", "-")


__all__ = ["OUTPUT_TYPES", "output_type"]
