"""Any file becomes a grey frame: images and DICOM, the fan, lists of files, what to leave out, phantoms, packs."""
