//! Writes `traffic.json`: `cargo run --example traffic > traffic.json`. The same seed gives the
//! same bytes.

use std::fmt::Write as _;

const SEED: u64 = 2020;
const RECORDS: usize = 1000;

const GIVEN: [&str; 40] = [
    "Adela",
    "Álvaro",
    "Amílcar",
    "Ana",
    "Begoña",
    "Belén",
    "Brenda",
    "César",
    "Concepción",
    "Damián",
    "Edgar",
    "Elías",
    "Esperanza",
    "Fátima",
    "Gaspar",
    "Gervasio",
    "Íñigo",
    "Inés",
    "Ismael",
    "Jacinta",
    "Jesús",
    "Julián",
    "Leonor",
    "Lucía",
    "Marcelino",
    "Martín",
    "Mónica",
    "Nicolás",
    "Ñusta",
    "Olga",
    "Óscar",
    "Pío",
    "Raquel",
    "Rigoberto",
    "Rocío",
    "Sofía",
    "Tomás",
    "Úrsula",
    "Verónica",
    "Yolanda",
];

const FAMILY: [&str; 36] = [
    "Acuña",
    "Aguilar",
    "Arévalo",
    "Ávila",
    "Barrios",
    "Cabañas",
    "Cáceres",
    "Castañeda",
    "Chávez",
    "Coc",
    "Choc",
    "Díaz",
    "Escobar",
    "Figueroa",
    "Gálvez",
    "Girón",
    "Godínez",
    "Ibáñez",
    "Juárez",
    "López",
    "Marroquín",
    "Mejía",
    "Muñoz",
    "Núñez",
    "Ordóñez",
    "Peña",
    "Quiñónez",
    "Ramírez",
    "Sáenz",
    "Solís",
    "Tzul",
    "Urízar",
    "Vásquez",
    "Xicará",
    "Yax",
    "Zúñiga",
];

const PLACES: [&str; 40] = [
    "Antigua Guatemala",
    "Asunción",
    "Bogotá",
    "Chichicastenango",
    "Chimaltenango",
    "Chiquimula",
    "Ciudad de Guatemala",
    "Cobán",
    "Cuenca",
    "Cusco",
    "El Progreso",
    "Escuintla",
    "Esquipulas",
    "Flores",
    "Huehuetenango",
    "Jalapa",
    "Jutiapa",
    "La Ceiba",
    "León",
    "Mazatenango",
    "Medellín",
    "Mérida",
    "Mixco",
    "Panajachel",
    "Petén",
    "Puerto Barrios",
    "Quetzaltenango",
    "Quiché",
    "Retalhuleu",
    "Salamá",
    "San José",
    "San Marcos",
    "Santa Ana",
    "Sololá",
    "Tegucigalpa",
    "Totonicapán",
    "Valparaíso",
    "Viña del Mar",
    "Zacapa",
    "Ñemby",
];

const TYPES: [&str; 3] = ["imported", "non-imported", "communitary"];
const STATES: [&str; 2] = ["symptomatic", "asymptomatic"];

/// The file as text: a JSON array with one record per line.
#[must_use]
pub fn traffic() -> String {
    let mut random = fastrand::Rng::with_seed(SEED);
    let mut text = String::from("[\n");
    for at in 0..RECORDS {
        let mut one_of = |list: &[&'static str]| list[random.usize(..list.len())];
        let given = one_of(&GIVEN);
        let family = one_of(&FAMILY);
        let second = one_of(&FAMILY);
        let place = one_of(&PLACES);
        let kind = one_of(&TYPES);
        let state = one_of(&STATES);
        let age = random.u8(0..=99);
        let comma = if at + 1 < RECORDS { "," } else { "" };
        writeln!(
            text,
            "{{\"name\":\"{given} {family} {second}\",\"location\":\"{place}\",\"age\":{age},\
             \"infectedtype\":\"{kind}\",\"state\":\"{state}\"}}{comma}"
        )
        .expect("writing to a string cannot fail");
    }
    text.push_str("]\n");
    text
}

#[allow(dead_code, reason = "the tests use the text only")]
fn main() {
    print!("{}", traffic());
}
