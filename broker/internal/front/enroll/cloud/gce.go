package cloud

import (
	"crypto"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"path"

	"github.com/countersign/countersign/attestors/tpm"
)

// gceKey is a key as `gcloud compute instances get-shielded-identity` prints it.
type gceKey struct {
	Certificate string `json:"ekCert"`
	Public      string `json:"ekPub"`
}

// readGCE reads that command's answer, wrapped with the instance's name and zone,
// which the answer lacks. The signing keys in it aren't endorsement keys.
func readGCE(raw json.RawMessage) (answer, error) {
	var in struct {
		Name     string `json:"name"`
		Zone     string `json:"zone"`
		Project  string `json:"project"`
		Identity struct {
			RSA *gceKey `json:"encryptionKey"`
			ECC *gceKey `json:"eccP256EncryptionKey"`
		} `json:"identity"`
	}
	if err := json.Unmarshal(raw, &in); err != nil {
		return answer{}, err
	}
	if in.Name == "" || in.Zone == "" {
		return answer{}, errors.New("name or zone is missing: wrap each answer as docs/CLOUDS.md shows")
	}
	zone := path.Base(in.Zone) // gcloud also prints it as a URL
	a := answer{id: in.Project + "/" + zone + "/" + in.Name, name: in.Name, labels: map[string]string{"cloud": "gce", "zone": zone}}

	for _, k := range []struct {
		name string
		*gceKey
	}{{"encryptionKey", in.Identity.RSA}, {"eccP256EncryptionKey", in.Identity.ECC}} {
		if k.gceKey == nil || *k.gceKey == (gceKey{}) {
			continue
		}
		key, err := k.key()
		if err != nil {
			return answer{}, fmt.Errorf("%s: %s: %w", in.Name, k.name, err)
		}
		a.keys = append(a.keys, key)
	}
	if len(a.keys) == 0 {
		return answer{}, fmt.Errorf("%s: no encryptionKey and no eccP256EncryptionKey: is it a Shielded VM with vTPM?", in.Name)
	}
	return a, nil
}

func (k *gceKey) key() (crypto.PublicKey, error) {
	key, err := pemKey(k.Public)
	if err != nil {
		return nil, fmt.Errorf("ekPub: %w", err)
	}
	if k.Certificate == "" {
		return key, nil
	}
	block, _ := pem.Decode([]byte(k.Certificate))
	if block == nil {
		return nil, errors.New("ekCert: not PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("ekCert: %w", err)
	}
	if public, err := x509.MarshalPKIXPublicKey(key); err != nil || !tpm.Certifies(cert, public) {
		return nil, errors.New("ekCert is for another key than ekPub")
	}
	return key, nil
}
