"""The rule-based labeller on sentences as radiologists write them."""

from __future__ import annotations

import pytest

from ctinstruct_hf.data.labeller import FINDINGS, find_mentions, label_report
from ctinstruct_hf.errors import CTInstructError

NORMAL = (
    "Trachea, both main bronchi are open. Mediastinal main vascular structures, heart contour, size are normal. "
    "Pericardial effusion-thickening was not observed. No enlarged lymph nodes in prevascular, pre-paratracheal, "
    "subcarinal or bilateral hilar-axillary pathological dimensions were detected. When examined in the lung parenchyma "
    "window; aeration of both lung parenchyma is normal and no nodular or infiltrative lesion is detected in the lung "
    "parenchyma. Pleural effusion-thickening was not detected. Vertebral corpus heights are preserved."
)
SENTENCES = [
    (
        "Calcific atheroma plaques are observed in the aorta and coronary arteries.",
        "arterial wall calcification,coronary artery wall calcification",
    ),
    ("There are calcified atheromatous plaques in the LAD.", "coronary artery wall calcification"),
    ("A sliding type hiatal hernia is observed at the lower end of the esophagus.", "hiatal hernia"),
    (
        "There are a few millimetric nonspecific nodules in both lungs, the largest of which is 4 mm in diameter and no active infiltration or mass lesion is observed.",
        "lung nodule",
    ),
    ("Sequela fibrotic changes are observed in the apex of both lungs.", "pulmonary fibrotic sequela"),
    ("Pleuroparenchymal sequelae density increases in both apices.", "pulmonary fibrotic sequela"),
    ("Old rib fracture sequelae on the right.", ""),
    ("The previously seen pleural effusion has completely resolved.", ""),
    ("Compared with the prior CT, the 6 mm nodule in the right upper lobe is unchanged.", "lung nodule"),
    ("No significant change in the 6 mm nodule in the left lower lobe.", "lung nodule"),
    ("No pleural effusion, consolidation, or pneumothorax.", ""),
    ("No pleural effusion was detected, and there are bilateral ground-glass opacities.", "lung opacity"),
    ("Small left pleural effusion, no consolidation.", "pleural effusion"),
    ("Heart size is increased. Cardiothoracic ratio increased in favor of the heart.", "cardiomegaly"),
    ("The heart is mildly enlarged.", "cardiomegaly"),
    ("The heart is not enlarged.", ""),
    ("Heart size is normal, no pericardial effusion.", ""),
    ("Pacemaker with leads in the right ventricle.", "medical material"),
    ("Central venous catheter tip terminates in the superior vena cava.", "medical material"),
    ("Several mediastinal lymph nodes with short axes measuring up to 6 mm.", ""),
    ("Mediastinal lymph nodes measuring up to 15 mm in short axis are observed.", "lymphadenopathy"),
    ("Lymph nodes that do not reach pathological dimensions are seen in the mediastinum.", ""),
    ("Enlarged right paratracheal lymph node measuring 14 x 12 mm.", "lymphadenopathy"),
    ("Mosaic attenuation pattern is observed in both lungs.", "mosaic attenuation pattern"),
    ("Peribronchial thickening and tubular bronchiectasis in lower lobes.", "peribronchial thickening,bronchiectasis"),
    ("Bronchial wall thickening is present.", "peribronchial thickening"),
    ("Smooth interlobular septal thickenings are observed in both lungs.", "interlobular septal thickening"),
    ("Crazy paving pattern in the left lower lobe.", "interlobular septal thickening,lung opacity"),
    ("Subcutaneous emphysema on the left chest wall.", ""),
    ("Emphysematous changes are present in both lungs; bullae at the apex.", "emphysema"),
    ("Linear atelectasis is noted in the middle lobe and lingula.", "atelectasis"),
    ("Hypodense nodule in the right thyroid lobe.", ""),
    ("A 12 mm nodule in the left adrenal gland.", ""),
    ("Fatty infiltration of the liver.", ""),
    ("There is minimal pericardial effusion measuring 5 mm at its thickest point.", "pericardial effusion"),
    ("Pleural and pericardial effusion were not detected.", ""),
    ("Pericardial effusion is observed, pleural effusion was not detected.", "pericardial effusion"),
    (
        "No lymphadenopathy. Bilateral pleural effusions with adjacent passive atelectasis.",
        "pleural effusion,atelectasis",
    ),
    (
        "No evidence of emphysema or bronchiectasis. Consolidation with air bronchograms in the right lower lobe.",
        "consolidation",
    ),
    (
        "Pleural effusion is no longer seen; the consolidation has regressed but persists in the left lower lobe.",
        "consolidation",
    ),
    ("Aortic valve calcification.", ""),
    ("Effusion reaching 3 cm in thickness is observed in the right hemithorax.", "pleural effusion"),
    ("No new nodules. The known 8 mm nodule in the lingula is stable.", "lung nodule"),
    ("The lungs are clear without focal consolidation, nodule, or effusion.", ""),
    (
        "There is no mediastinal or hilar lymphadenopathy by size criteria. Coronary artery calcifications.",
        "coronary artery wall calcification",
    ),
    (
        "Sternotomy wires and coronary artery bypass grafts are noted. Calcification of the thoracic aorta.",
        "medical material,arterial wall calcification",
    ),
    ("Nodule without calcification in the right middle lobe.", "lung nodule"),
    ("Pulmonary arteries are of normal caliber. Bronchi are patent.", ""),
    ("Consolidation cannot be excluded.", "consolidation"),
    (
        "Nodular ground-glass density increases in both lungs, evaluated in favor of viral pneumonia.",
        "lung nodule,lung opacity",
    ),
    ("There is no increase in the size of the pleural effusion on the left.", "pleural effusion"),
    ("Wall calcifications are observed in the aortic arch.", "arterial wall calcification"),
    ("Neither consolidation nor ground glass opacity is seen.", ""),
    ("Hiatal hernia: none. Emphysema: mild centrilobular.", "emphysema"),
    ("Interval resolution of the left pleural effusion.", ""),
    (
        "Lungs: Dependent atelectasis. No suspicious pulmonary nodule. Pleura: No effusion. Heart: No cardiomegaly or pericardial effusion.",
        "atelectasis",
    ),
    ("A calcified granuloma in the right lung. Calcified mediastinal lymph nodes.", ""),
    ("Clinical information: rule out consolidation. Normal study.", ""),
    (
        "No pathologically enlarged lymph nodes were observed. In the right lung, a nodule with a diameter of 5.5 mm was observed, and no pleural effusion was detected.",
        "lung nodule",
    ),
    (
        "In comparison with the examination dated 2019, bilateral pleural effusion, which was present in the previous examination, was not observed in the current examination.",
        "",
    ),
    ("Bilateral pleural effusion increased compared to previous examination.", "pleural effusion"),
    (
        "Ground glass areas observed previously have disappeared. Fibroatelectatic sequelae changes in the left lower lobe.",
        "atelectasis,pulmonary fibrotic sequela",
    ),
    (
        "Both lungs show paraseptal emphysema and minimal peribronchial cuffing but no bronchiectasis.",
        "emphysema,peribronchial thickening",
    ),
    ("Endotracheal tube and nasogastric tube in place.", "medical material"),
    ("Except for a 3 mm subpleural nodule, the lungs are normal.", "lung nodule"),
    ("There are no findings other than minimal atelectasis.", "atelectasis"),
    (
        "Trace left effusion. Stable cardiomegaly. Aortic atherosclerosis.",
        "pleural effusion,cardiomegaly,arterial wall calcification",
    ),
    (
        "Heart dimensions have increased and minimal pericardial effusion is observed. No pleural effusion.",
        "cardiomegaly,pericardial effusion",
    ),
    ("The heart size is within normal limits. There is no cardiomegaly.", ""),
    ("Interlobular septal thickening is not seen. Infiltrative lesion was not detected in both lungs.", ""),
    (
        "Segmental - subsegmental atelectatic changes are observed in the left lung inferior lingular segment and both lung lower lobes.",
        "atelectasis",
    ),
    ("Millimetric calcified nodule in the right upper lobe.", "lung nodule"),
    (
        "Diffuse calcified atherosclerotic plaques on the walls of the aorta, its branches and coronary arteries.",
        "arterial wall calcification,coronary artery wall calcification",
    ),
    ("Lung parenchyma is free of infiltrates, nodules or consolidation.", ""),
    ("Free fluid is observed between the leaves of the right pleura, reaching 22 mm.", "pleural effusion"),
    ("No pneumothorax, with a small right pleural effusion.", "pleural effusion"),
    ("Lymph node with a short axis of 1.3 cm in the subcarinal region.", "lymphadenopathy"),
    ("Breast implants bilaterally.", "medical material"),
    ("Left lower lobe bronchi are dilated with wall thickening.", "bronchiectasis,peribronchial thickening"),
    ("The thyroid gland is normal. A 7 mm pulmonary nodule in the left upper lobe.", "lung nodule"),
    ("Compression fracture with collapse of T12 vertebra.", ""),
    ("A few nodules are unchanged since 2018. No effusion.", "lung nodule"),
    (
        "Findings are consistent with fibrosis. There is traction bronchiectasis.",
        "pulmonary fibrotic sequela,bronchiectasis",
    ),
    (
        "Heart contour and size are normal. Calibration of mediastinal major vascular structures is natural. Millimetric calcific plaques are observed in the coronary arteries.",
        "coronary artery wall calcification",
    ),
    (
        "Minimal pleural effusion is observed in the left hemithorax. No pericardial effusion was observed.",
        "pleural effusion",
    ),
    ("No lymph node in pathological size and appearance was detected in the mediastinum.", ""),
    (
        "In the lower lobes of both lungs, nodules of 3 to 4 mm are seen; these were present on the prior exam.",
        "lung nodule",
    ),
    ("Nodules described in the previous examination are not seen in the current examination.", ""),
    ("Consolidation in the right lower lobe has decreased since the prior study.", "consolidation"),
    ("There is a port catheter on the right chest wall. Heart sizes have increased.", "medical material,cardiomegaly"),
    (
        "Aorta and coronary arteries show calcific atherosclerotic changes.",
        "arterial wall calcification,coronary artery wall calcification",
    ),
    (
        "Atherosclerotic calcifications in the aortic arch, and no coronary calcification.",
        "arterial wall calcification",
    ),
    ("No coronary artery calcification is seen.", ""),
    (
        "Ground-glass opacities and consolidations are seen in both lungs, predominantly peripheral, suspicious for COVID-19 pneumonia.",
        "lung opacity,consolidation",
    ),
    (
        "There is no active infiltration or mass lesion in both lungs, but minimal emphysematous changes are observed.",
        "emphysema",
    ),
    (
        "Bilateral peribronchial thickenings and mild mosaic attenuation are noted.",
        "peribronchial thickening,mosaic attenuation pattern",
    ),
    ("No hiatal hernia, no emphysema; linear scarring at the lung bases.", "pulmonary fibrotic sequela"),
    ("Small hiatal hernia. Otherwise unremarkable.", "hiatal hernia"),
    ("Post-sternotomy changes with a prosthetic aortic valve.", "medical material"),
    ("Pulmonary nodules are absent.", ""),
    ("The right pleural effusion is smaller than before and the left one has disappeared.", "pleural effusion"),
    ("Pleural effusion was not seen on the left, but 2 cm of effusion persists on the right.", "pleural effusion"),
    ("Lymphadenopathy measuring 22x15 mm in the right hilum is new since the previous CT.", "lymphadenopathy"),
    ("Nodule in the left lower lobe, previously 5 mm, now measures 8 mm.", "lung nodule"),
    ("There is no significant interval change in cardiomegaly.", "cardiomegaly"),
    ("Interstitial thickening is not observed, and bronchiectasis was not detected either.", ""),
    (
        "Bilateral lungs show no nodules, consolidation or ground glass. Heart is normal in size without pericardial effusion.",
        "",
    ),
    ("A stent is observed in the left main coronary artery.", "medical material"),
    ("Thoracic aorta is ectatic with wall calcification.", "arterial wall calcification"),
    ("Linear atelectasis in the left lower lobe; elsewhere the lungs are normal.", "atelectasis"),
    (
        "No signs of pneumonia. A calcified nodule in the apex consistent with sequelae.",
        "lung nodule,pulmonary fibrotic sequela",
    ),
    ("Pleural thickening and effusion are not present.", ""),
    ("Impression: 1. No acute findings. 2. Stable 4 mm nodule. 3. Mild emphysema.", "lung nodule,emphysema"),
    ("Minimal pericardial fluid is within physiological limits.", ""),
    ("Collapse of the left lower lobe secondary to the pleural effusion.", "atelectasis,pleural effusion"),
    ("No lymph nodes were enlarged. The hilar lymph nodes are not enlarged.", ""),
    (
        "Patient with known lymphoma: multiple enlarged axillary and mediastinal lymph nodes, largest 30 mm.",
        "lymphadenopathy",
    ),
    ("Volume loss and atelectasis in the middle lobe were stable.", "atelectasis"),
    (
        "Pleural effusion and atelectasis are not observed in the left lung, in the right lung there is a nodule of 9 mm.",
        "lung nodule",
    ),
    ("There was no pleural or pericardial effusion.", ""),
    ("Right pleural and minimal pericardial effusion are present.", "pleural effusion,pericardial effusion"),
    ("Tubular bronchiectatic changes; wall thickness increases in bronchi.", "bronchiectasis,peribronchial thickening"),
    (
        "Peripheral reticular density increases and septal thickening are observed.",
        "lung opacity,interlobular septal thickening",
    ),
    ("Findings: Lungs are well aerated. No opacities. Heart size is top normal.", ""),
    (
        "No evidence of thoracic lymphadenopathy or pleural effusion is seen. The esophagus shows a hiatal hernia.",
        "hiatal hernia",
    ),
    (
        "Trachea and both main bronchi are open. No occlusive pathology was observed in the trachea and both main bronchi. Mediastinal structures cannot be evaluated optimally because contrast material is not given. As far as can be observed: Heart size increased. There are calcific atheroma plaques in the aortic arch and coronary arteries. Pericardial effusion was not detected. Right upper paratracheal, prevascular lymph nodes with a short axis of 7 mm. Sliding type hiatal hernia at the lower end of the esophagus. When examined in the lung parenchyma window; Diffuse mosaic attenuation pattern was observed in both lungs (small airway disease? small vessel disease?). There is no pleural effusion or pneumothorax. A hypodense nodular lesion of the left adrenal gland compatible with adenoma.",
        "cardiomegaly,arterial wall calcification,coronary artery wall calcification,hiatal hernia,mosaic attenuation pattern",
    ),
    (
        "Mediastinal main vascular structures and heart examination IV were not evaluated optimally because there was no contrast. There are calcific plaque formations in the coronary artery walls.",
        "coronary artery wall calcification",
    ),
    (
        "Thickening of the bronchial walls in the central parts and minimal bronchiectatic changes are present in both lungs.",
        "peribronchial thickening,bronchiectasis",
    ),
    (
        "There are consolidation areas with air bronchograms accompanied by ground glass densities in both lungs and minimal effusion in the left hemithorax.",
        "consolidation,lung opacity,pleural effusion",
    ),
    (
        "Both hemithorax are symmetrical. Calibration of trachea and main bronchi is natural. Mediastinal and hilar lymphadenopathy is not observed.",
        "",
    ),
    ("No mass, nodule or infiltration was detected in both lung parenchyma. No pleural effusion, pneumothorax.", ""),
    (
        "Post-op suture materials are seen at the sternum. Calcific atherosclerotic changes were observed in the wall of the thoracic aorta and coronary artery.",
        "medical material,arterial wall calcification,coronary artery wall calcification",
    ),
    (
        "Nodules previously described in the right lung are stable. New ground-glass opacity in the lingula.",
        "lung nodule,lung opacity",
    ),
    (
        "Regression was observed in the pleural effusion on the right compared to the previous examination.",
        "pleural effusion",
    ),
    (
        "Pleural effusion in the right hemithorax, which was 3 cm in the previous examination, has completely regressed.",
        "",
    ),
    ("No significant difference was found in the sizes of the nodules.", "lung nodule"),
    (
        "There are several lymph nodes in the mediastinum, the largest measuring 9x6 mm, none of which is pathologically enlarged.",
        "",
    ),
    ("There are lymph nodes in the mediastinum with a short diameter of 12 mm.", "lymphadenopathy"),
    ("Atelectatic changes are observed in the basal segments, no consolidation.", "atelectasis"),
    (
        "Fibrotic recessions and calcifications are observed in the apex of both lungs, sequela.",
        "pulmonary fibrotic sequela",
    ),
    (
        "Nasogastric tube extending to the stomach, central venous catheter ending in the right atrium. Bilateral pleural effusion reaching 4 cm at its thickest point and adjacent compression atelectasis.",
        "medical material,pleural effusion,atelectasis",
    ),
    ("The heart is normal in size. The pericardium is unremarkable. No effusion.", ""),
    (
        "There is no evidence of pulmonary embolism. Lungs: mild centrilobular emphysema. No suspicious nodules. Mild coronary calcification.",
        "emphysema,coronary artery wall calcification",
    ),
    (
        "A 5 mm nodule in the right lower lobe, without significant change since 2018. There is no lymphadenopathy.",
        "lung nodule",
    ),
    ("Ill-defined ground glass nodules are noted.", "lung nodule,lung opacity"),
    (
        "Cardiac silhouette is enlarged with small pericardial effusion. Left-sided ICD.",
        "cardiomegaly,pericardial effusion,medical material",
    ),
    ("The effusion seen previously is no longer present; emphysema persists.", "emphysema"),
    (
        "Smooth thickening of interlobular septa, bilateral effusions and cardiomegaly, suggestive of congestive heart failure.",
        "interlobular septal thickening,pleural effusion,cardiomegaly",
    ),
    ("No consolidation, ground-glass opacity, or crazy-paving pattern. Minimal dependent atelectasis.", "atelectasis"),
    (
        "Aorta and its branches have calcified plaques; the coronary arteries are free of calcification.",
        "arterial wall calcification",
    ),
    ("Previously noted consolidation is now replaced by fibrotic bands.", "pulmonary fibrotic sequela"),
    (
        "Bronchiectasis and peribronchial thickening, which were also present in 2017, continue.",
        "bronchiectasis,peribronchial thickening",
    ),
    ("There is not any hiatal hernia. Emphysema or bullae are absent.", ""),
    ("Increased cardiothoracic ratio. Pleural fluid is seen in both hemithoraces.", "cardiomegaly,pleural effusion"),
    ("Small air cyst in the right upper lobe. Calcified lymph nodes in the hilum.", ""),
    ("No pathological wall thickness increase was observed in the esophagus.", ""),
    ("There is a 2 cm mass in the liver. Nodular liver contour. Splenic nodules.", ""),
]


def present(text: str, **options: bool) -> set[str]:
    return {name for name, there in label_report(text, **options).items() if there}


@pytest.mark.parametrize(("text", "found"), SENTENCES, ids=[text[:60] for text, _ in SENTENCES])
def test_a_sentence_names_what_is_there(text: str, found: str) -> None:
    assert present(text) == set(filter(None, found.split(",")))


def test_a_normal_report_has_no_finding_and_all_18_keys() -> None:
    assert list(label_report(NORMAL)) == list(FINDINGS)
    assert len(FINDINGS) == 18
    assert present(NORMAL) == set()
    assert present("") == set()
    labels = label_report("Emphysema.")
    assert labels["Emphysema"] is labels["emphysema"] is True  # as the columns of CT-RATE are written too
    assert "Lung nodule" in labels
    assert labels.get("Lung nodule") is False
    with pytest.raises(KeyError):
        labels["gout"]


def test_several_sentences_are_read_together() -> None:
    text = "No pleural effusion. " + NORMAL + " A 6 mm nodule in the right upper lobe, unchanged since 2019."
    assert present(text) == {"lung nodule"}


def test_what_is_only_possible_counts_as_asked_for() -> None:
    text = "Consolidation cannot be excluded. Possible small hiatal hernia. Emphysema."
    assert present(text) == {"consolidation", "hiatal hernia", "emphysema"}
    assert present(text, uncertain=False) == {"emphysema"}
    assert {one.status for one in find_mentions(text)} == {"uncertain", "present"}


def test_every_finding_is_found_and_negated() -> None:
    for name in FINDINGS:
        assert name in present(f"There is {name}."), name
        assert name not in present(f"No {name} was observed."), name
        assert name not in present(f"{name.capitalize()} is not seen."), name


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(CTInstructError, match="must be text"):
        label_report(None)  # type: ignore[arg-type]
