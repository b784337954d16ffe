"""What tests of files share: noise, saving frames as files of any kind, reading them back."""
import numpy as np
import pytest
from PIL import Image

from frames.images import load_frame, read_frames


def speckle(seed, shape=(20, 30)):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, *pages, **options):
    """Arrays or Pillow images, the pages of one file -> its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pages = [page if isinstance(page, Image.Image) else Image.fromarray(page) for page in pages]
    more = {"save_all": True, "append_images": pages[1:]} if len(pages) > 1 else {}
    pages[0].save(path, **more, **options)
    return str(path)


def save_dicom(path, frames, patient="P7", study="1.2.7", **elements):
    """uint8 (n, h, w) as DICOM with grey values as they are -> the path."""
    pydicom = pytest.importorskip("pydicom")
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = pydicom.uid.UltrasoundMultiFrameImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3"
    ds.PatientID, ds.StudyInstanceUID = patient, study
    ds.PhotometricInterpretation, ds.SamplesPerPixel = "MONOCHROME2", 1
    ds.NumberOfFrames, ds.Rows, ds.Columns = frames.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PixelData = frames.tobytes() + b"\0" * (frames.size % 2)
    ds["PixelData"].VR = "OB"
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return str(path)


def load_grey(path):
    return load_frame(path).grey


def greys(path, first=0):
    return [frame.grey for frame in read_frames(path, first)]
