"""Maps of a result in the formats of other programs: DICOM, NIfTI, BIDS."""
