use super::*;

#[actix_rt::test]
async fn a_disk_that_refuses_many_records_is_told_once() {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::open(folder.path(), 1 << 30).unwrap();
    let (buffer, _out) = new(spool, ApiBreakers::new(std::iter::empty()));
    let told = [false, true, true, true, false, false, true, false];
    let told = told.map(|refuses| buffer.clone().is_news(refuses));
    assert_eq!(told, [false, true, false, false, true, false, true, true]);
}
